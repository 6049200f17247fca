//! What a machine has done since its process began, over all resets: for `bivisor stat` and `bivisor top`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bivisor_machine::block::{BlockDone, BlockOperation, BlockStore};
use bivisor_machine::exits::{Exits, Kind};
use bivisor_machine::packet::{Offload, PacketPort, PacketReceiver, PortFeatures};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::config::{Paravirtual, VmConfig};

/// What a machine tells of itself. All numbers but the memory's size only grow while its process lives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// The engine.
    pub engine: String,
    /// Whether the guest is offered the paravirtual interface.
    pub pv: bool,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// How long its process has been there.
    pub uptime_nanoseconds: u64,
    /// CPU time of its process.
    pub cpu_nanoseconds: u64,
    /// How often the guest has reset it.
    pub resets: u64,
    /// Its virtual processors.
    pub cpus: Vec<CpuStatistics>,
    /// Its disks, in the order of their devices.
    pub disks: Vec<TrafficStatistics>,
    /// Its network interfaces.
    pub networks: Vec<TrafficStatistics>,
}

/// Why a virtual processor's guest code was left.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuStatistics {
    /// By kind ([`Kind::name`]).
    pub exits: BTreeMap<String, u64>,
    /// Those that are traps ([`Kind::is_trap`]).
    pub traps: u64,
    /// Hypercalls by number; 16 is for all from there on.
    pub hypercalls: BTreeMap<u64, u64>,
}

impl CpuStatistics {
    fn add(&mut self, exits: &Exits) {
        for kind in Kind::all() {
            let count = exits.of(kind);
            *self.exits.entry(kind.name().into()).or_default() += count;
            self.traps += if kind.is_trap() { count } else { 0 };
        }
        for (number, count) in exits.hypercalls().filter(|&(_, count)| count != 0) {
            *self.hypercalls.entry(number).or_default() += count;
        }
    }

    /// All hypercalls.
    pub fn all_hypercalls(&self) -> u64 {
        self.hypercalls.values().sum()
    }

    /// All exits, hypercalls included.
    pub fn all(&self) -> u64 {
        self.exits.values().sum::<u64>() + self.all_hypercalls()
    }
}

/// What went through a device, as the guest sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficStatistics {
    /// Reads from the disk, or frames that the guest got.
    pub in_requests: u64,
    /// Their bytes.
    pub in_bytes: u64,
    /// Writes to the disk, or frames that the guest sent. Large segments count as one.
    pub out_requests: u64,
    /// Their bytes.
    pub out_bytes: u64,
}

/// What went through a device.
#[derive(Debug, Default)]
pub struct Traffic {
    into: Counted,
    out_of: Counted,
}

#[derive(Debug, Default)]
struct Counted {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl Counted {
    fn count(&self, bytes: usize) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Traffic {
    fn statistics(&self) -> TrafficStatistics {
        TrafficStatistics {
            in_requests: self.into.requests.load(Ordering::Relaxed),
            in_bytes: self.into.bytes.load(Ordering::Relaxed),
            out_requests: self.out_of.requests.load(Ordering::Relaxed),
            out_bytes: self.out_of.bytes.load(Ordering::Relaxed),
        }
    }
}

/// A disk's store whose requests are counted.
pub struct CountedStore {
    /// The store.
    pub inner: Arc<dyn BlockStore>,
    /// The counters.
    pub traffic: Arc<Traffic>,
}

impl BlockStore for CountedStore {
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn read_only(&self) -> bool {
        self.inner.read_only()
    }
    fn can_discard(&self) -> bool {
        self.inner.can_discard()
    }
    fn submit(&self, operation: BlockOperation, done: BlockDone) {
        match &operation {
            BlockOperation::Read { buffer, .. } => self.traffic.into.count(buffer.len()),
            BlockOperation::Write { buffer, .. } => self.traffic.out_of.count(buffer.len()),
            BlockOperation::Flush | BlockOperation::Discard { .. } | BlockOperation::WriteZeroes { .. } => {}
        }
        self.inner.submit(operation, done);
    }
    fn drain(&self) {
        self.inner.drain();
    }
}

/// A network's port whose frames are counted.
pub struct CountedPort {
    /// The port.
    pub inner: Arc<dyn PacketPort>,
    /// The counters.
    pub traffic: Arc<Traffic>,
}

struct CountedReceiver {
    inner: Arc<dyn PacketReceiver>,
    traffic: Arc<Traffic>,
}

impl PacketPort for CountedPort {
    fn features(&self) -> PortFeatures {
        self.inner.features()
    }
    fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>, accepted: PortFeatures) {
        let counted = |inner| -> Arc<dyn PacketReceiver> {
            Arc::new(CountedReceiver { inner, traffic: self.traffic.clone() })
        };
        self.inner.attach(receiver.map(counted), accepted);
    }
    fn send(&self, frame: &[u8], offload: &Offload) {
        self.traffic.out_of.count(frame.len());
        self.inner.send(frame, offload);
    }
    fn ready(&self) {
        self.inner.ready();
    }
}

impl PacketReceiver for CountedReceiver {
    fn receive(&self, frame: &[u8], offload: &Offload) -> bool {
        let taken = self.inner.receive(frame, offload);
        if taken {
            self.traffic.into.count(frame.len());
        }
        taken
    }
}

/// The counters of all runs of a machine.
pub struct Counters {
    engine: String,
    pv: bool,
    memory: u64,
    start: Instant,
    disks: Vec<Arc<Traffic>>,
    networks: Vec<Arc<Traffic>>,
    runs: Mutex<Runs>,
}

#[derive(Default)]
struct Runs {
    /// Of the runs that are over.
    over: Vec<CpuStatistics>,
    count: u64,
    /// Of the one that goes on.
    current: Vec<Arc<Exits>>,
}

impl Counters {
    /// For a machine whose engine is chosen.
    pub fn new(config: &VmConfig, disks: Vec<Arc<Traffic>>, networks: Vec<Arc<Traffic>>) -> Self {
        Self {
            engine: config.engine.name().into(),
            pv: config.pv == Paravirtual::On,
            memory: config.memory.0,
            start: Instant::now(),
            disks,
            networks,
            runs: Mutex::default(),
        }
    }

    /// The last run is over, and another one begins with these counters, one for each processor.
    pub fn begin(&self, exits: &[Arc<Exits>]) {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        runs.over = runs.cpus();
        runs.current = exits.to_vec();
        runs.count += 1;
    }

    /// What there is to tell now.
    pub fn statistics(&self) -> Statistics {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        let runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |all: &[Arc<Traffic>]| all.iter().map(|traffic| traffic.statistics()).collect();
        Statistics {
            engine: self.engine.clone(),
            pv: self.pv,
            memory_bytes: self.memory,
            uptime_nanoseconds: self.start.elapsed().as_nanos() as u64,
            cpu_nanoseconds: time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs(),
            resets: runs.count.saturating_sub(1),
            cpus: runs.cpus(),
            disks: of(&self.disks),
            networks: of(&self.networks),
        }
    }
}

impl Runs {
    fn cpus(&self) -> Vec<CpuStatistics> {
        let mut cpus = self.over.clone();
        cpus.resize(self.current.len(), CpuStatistics::default());
        cpus.iter_mut().zip(&self.current).for_each(|(cpu, exits)| cpu.add(exits));
        cpus
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::RunArgs;

    #[test]
    fn counters_go_on_over_a_reset() {
        let config = VmConfig::new(&RunArgs::default()).unwrap();
        let counters = Counters::new(&config, Vec::new(), Vec::new());
        let run = || [Arc::new(Exits::default()), Arc::new(Exits::default())];
        let first = run();
        counters.begin(&first);
        first[0].count(Kind::Port);
        first[1].count_hypercall(5);
        let second = run();
        counters.begin(&second);
        second[0].count(Kind::Port);
        second[0].count(Kind::Halt);
        second[1].count_hypercall(10);
        let told = counters.statistics();
        assert_eq!((told.resets, told.cpus.len()), (1, 2));
        assert_eq!((told.cpus[0].exits["port"], told.cpus[0].traps, told.cpus[0].all()), (2, 2, 3));
        assert_eq!(told.cpus[1].hypercalls, BTreeMap::from([(5, 1), (10, 1)]));
        assert!(told.cpu_nanoseconds > 0);
        let text = serde_json::to_string(&told).unwrap();
        assert_eq!(serde_json::from_str::<Statistics>(&text).unwrap(), told);
    }

    struct Memory;

    impl BlockStore for Memory {
        fn size(&self) -> u64 {
            4096
        }
        fn read_only(&self) -> bool {
            false
        }
        fn can_discard(&self) -> bool {
            true
        }
        fn submit(&self, _: BlockOperation, done: BlockDone) {
            done(Ok(()), Vec::new());
        }
        fn drain(&self) {}
    }

    #[test]
    fn a_disks_reads_and_writes_are_counted_apart() {
        let store = CountedStore { inner: Arc::new(Memory), traffic: Arc::default() };
        for operation in [
            BlockOperation::Read { offset: 0, buffer: vec![0; 512] },
            BlockOperation::Read { offset: 0, buffer: vec![0; 1024] },
            BlockOperation::Write { offset: 0, buffer: vec![0; 2048] },
            BlockOperation::Flush,
        ] {
            store.submit(operation, Box::new(|result, _| assert_eq!(result, Ok(()))));
        }
        let expected = TrafficStatistics { in_requests: 2, in_bytes: 1536, out_requests: 1, out_bytes: 2048 };
        assert_eq!(store.traffic.statistics(), expected);
        assert_eq!((store.size(), store.read_only(), store.can_discard()), (4096, false, true));
    }

    /// A network that gives back what it gets, as long as there is room.
    #[derive(Default)]
    struct Loop(Mutex<Option<Arc<dyn PacketReceiver>>>);

    impl PacketPort for Loop {
        fn features(&self) -> PortFeatures {
            PortFeatures::default()
        }
        fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>, _: PortFeatures) {
            *self.0.lock().unwrap() = receiver;
        }
        fn send(&self, frame: &[u8], offload: &Offload) {
            if let Some(receiver) = &*self.0.lock().unwrap() {
                receiver.receive(frame, offload);
            }
        }
    }

    struct Small;

    impl PacketReceiver for Small {
        fn receive(&self, frame: &[u8], _: &Offload) -> bool {
            frame.len() <= 100
        }
    }

    #[test]
    fn frames_are_counted_when_they_are_taken() {
        let port = CountedPort { inner: Arc::new(Loop::default()), traffic: Arc::default() };
        port.attach(Some(Arc::new(Small)), PortFeatures::default());
        [60, 1514].iter().for_each(|&length| port.send(&vec![0; length], &Offload::default()));
        let expected = TrafficStatistics { in_requests: 1, in_bytes: 60, out_requests: 2, out_bytes: 1574 };
        assert_eq!(port.traffic.statistics(), expected);
    }
}
