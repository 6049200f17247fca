//! Who executes when: all virtual processors take turns on the one real processor.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::Display;

use bivisor_machine::host::{Clock, Nanos};

use crate::console::{Console, Key, Keys, println, serial};
use crate::turns::{Place, SLICE, Turns};
use crate::vm::{Host, Outcome, Vm};

/// All machines.
pub(crate) struct Scheduler {
    host: Arc<Host>,
    console: Arc<Console>,
    /// By their index on the console; `None` has ended.
    machines: Vec<Option<Vm>>,
    keys: Keys,
    turns: Turns,
}

impl Scheduler {
    pub(crate) fn new(host: Arc<Host>, console: Arc<Console>, machines: Vec<Vm>) -> Self {
        let machines = machines.into_iter().map(Some).collect();
        Self { host, console, machines, keys: Keys::default(), turns: Turns::default() }
    }

    /// Runs until no machine is left.
    pub(crate) fn run(&mut self) {
        while self.machines.iter().any(Option::is_some) {
            self.read_keys();
            self.host.switches.deliver();
            let now = self.host.processor.clock.now();
            self.running().for_each(|vm| vm.expire(now));
            let next = self.next(now);
            let deadline = self.running().map(|vm| vm.deadline()).fold(now + SLICE, Nanos::min);
            self.host.processor.arm(deadline);
            match next {
                Some((machine, cpu)) => {
                    if let Some(Some(vm)) = self.machines.get_mut(machine) {
                        vm.run(cpu);
                    }
                    self.turns.charge(self.host.processor.clock.now().saturating_sub(now));
                    self.settle(machine);
                }
                None => self.host.processor.wait(),
            }
        }
    }

    fn running(&mut self) -> impl Iterator<Item = &mut Vm> {
        self.machines.iter_mut().flatten()
    }

    /// Whose turn it is.
    fn next(&mut self, now: Nanos) -> Option<Place> {
        let machines = self.machines.iter().enumerate();
        let present = machines.filter_map(|(index, vm)| vm.as_ref().map(|vm| (index, vm)));
        let runnable = present.flat_map(|(index, vm)| {
            (0..vm.cpus()).filter(move |cpu| vm.is_runnable(*cpu, now)).map(move |cpu| (index, cpu))
        });
        self.turns.next(runnable)
    }

    /// Acts on what has become of a machine.
    fn settle(&mut self, index: usize) {
        let Some(Some(vm)) = self.machines.get_mut(index) else { return };
        match vm.settle() {
            Outcome::Runs => {}
            Outcome::Restarted(why) => println!("bivisor: {}: {why}: it starts again", vm.name()),
            Outcome::Ended(why) => self.end(index, &why),
        }
    }

    /// Ends a machine, for this reason.
    fn end(&mut self, index: usize, why: &dyn Display) {
        if let Some(vm) = self.machines.get_mut(index).and_then(Option::take) {
            println!("bivisor: {}: {why}", vm.name());
            drop(vm);
            self.turns.remove(index);
            self.focus_on_next();
        }
    }

    /// Gives the keyboard to a machine that runs.
    fn focus_on_next(&self) {
        if let Some(Some(_)) = self.machines.get(self.console.focus()) {
            return;
        }
        if let Some(next) = self.machines.iter().position(Option::is_some) {
            self.console.set_focus(next);
        }
    }

    fn read_keys(&mut self) {
        while let Some(byte) = serial::read() {
            if let Some(key) = self.keys.typed(byte) {
                self.pressed(key);
            }
        }
    }

    fn pressed(&mut self, key: Key) {
        let focus = self.console.focus();
        match key {
            Key::Switch(index) => {
                if !matches!(self.machines.get(index), Some(Some(_))) || !self.console.set_focus(index) {
                    println!("bivisor: no machine {} runs", index + 1);
                }
            }
            Key::List => self.list(),
            Key::Help => println!("bivisor: {}", crate::console::HELP),
            Key::Guest(byte) => {
                if let Some(Some(vm)) = self.machines.get_mut(focus) {
                    vm.typed(byte);
                }
            }
            Key::Statistics => {
                if let Some(Some(vm)) = self.machines.get(focus) {
                    for (cpu, words, count) in vm.statistics() {
                        println!("bivisor: {} CPU {cpu} {count:>12} {words}", vm.name());
                    }
                }
            }
            Key::Reset => {
                if let Some(Some(vm)) = self.machines.get_mut(focus) {
                    let result = vm.restart();
                    println!("bivisor: {}: reset from the console", vm.name());
                    if let Err(error) = result {
                        self.end(focus, &error);
                    }
                }
            }
            Key::Stop => self.end(focus, &"stopped from the console"),
        }
    }

    fn list(&self) {
        for (index, vm) in self.machines.iter().enumerate() {
            let mark = if index == self.console.focus() { '*' } else { ' ' };
            match vm {
                Some(vm) => println!(
                    "bivisor: {mark}{} {}: {} CPUs, {} MiB",
                    index + 1,
                    vm.name(),
                    vm.cpus(),
                    vm.memory() >> 20
                ),
                None => println!("bivisor: {mark}{} has ended", index + 1),
            }
        }
    }
}
