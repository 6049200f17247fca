//! Rings against a model of the driver, and against a hostile one.

extern crate std;

use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::memory::GuestMemory;
use crate::virtio::testing::{Bench, RAM};
use alloc::sync::Arc;

#[derive(Clone, Debug)]
enum Step {
    /// The driver offers a request with so many bytes to read and to write in each piece.
    Offer(Vec<usize>, Vec<usize>),
    /// The device takes all.
    Take,
    /// The device gives back the taken request of this number, modulo how many there are, with so many bytes.
    Give(usize, u32),
    /// The driver collects what came back.
    Collect,
}

fn step() -> impl Strategy<Value = Step> {
    let pieces = || prop::collection::vec(1usize..40, 0..4);
    prop_oneof![
        3 => (pieces(), pieces())
            .prop_filter("a request has a piece", |(read, write)| !read.is_empty() || !write.is_empty())
            .prop_map(|(read, write)| Step::Offer(read, write)),
        2 => Just(Step::Take),
        3 => (any::<usize>(), 0u32..50).prop_map(|(which, written)| Step::Give(which, written)),
        2 => Just(Step::Collect),
    ]
}

fn features() -> impl Strategy<Value = u64> {
    let all = [EVENT_IDX, INDIRECT_DESC, RING_PACKED];
    prop::sample::subsequence(all.to_vec(), 0..=3).prop_map(|set| set.into_iter().sum())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    /// Every request comes out as it was offered and goes back once; nobody waits for a message that does not come.
    #[test]
    fn what_is_offered_comes_out_and_goes_back(
        features in features(),
        size_log in 0u32..4,
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let size = 1 << size_log;
        let bench = Bench::new(features);
        let (queue, mut driver) = bench.queue(0, size);
        let dma = queue.dma().clone();
        let (mut offered, mut taken, mut given) = (Vec::new(), Vec::new(), Vec::new());
        let mut counter = 0u8;
        // The device has found the ring empty: it must be told of the next request.
        let mut device_waits = false;
        for step in steps {
            match step {
                Step::Offer(read, write) if driver.has_room(read.len() + write.len()) => {
                    let data: Vec<Vec<u8>> = read.iter().map(|&length| {
                        counter = counter.wrapping_add(1);
                        vec![counter; length]
                    }).collect();
                    let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
                    let id = driver.offer(&slices, &write);
                    let entries = if features & INDIRECT_DESC != 0 { 1 } else { read.len() + write.len() };
                    if core::mem::take(&mut device_waits) {
                        prop_assert!(driver.must_notify(entries as u16));
                    }
                    offered.push((id, data.concat(), write.iter().sum::<usize>()));
                }
                Step::Take => {
                    for (id, data, room) in offered.drain(..) {
                        let chain = queue.pop().unwrap();
                        let mut bytes = vec![0; chain.readable() as usize];
                        chain.reader(&dma).read(&mut bytes);
                        prop_assert_eq!((chain.token.id, bytes), (id, data));
                        prop_assert_eq!(chain.writable() as usize, room);
                        taken.push(chain);
                    }
                    prop_assert_eq!(queue.pop(), None);
                    device_waits = true;
                }
                Step::Give(which, written) if !taken.is_empty() => {
                    let chain = taken.swap_remove(which % taken.len());
                    let written = written.min(chain.writable());
                    let bytes = vec![counter; written as usize];
                    prop_assert_eq!(chain.writer(&dma).write(&bytes), written as usize);
                    let (before, waits) = (bench.signals.used(0), given.is_empty());
                    queue.complete(chain.token, written);
                    // The driver has asked when it had collected all.
                    if waits {
                        prop_assert_eq!(bench.signals.used(0), before + 1);
                    }
                    given.push((chain.token.id, bytes));
                }
                Step::Collect => {
                    for (id, bytes) in given.drain(..) {
                        let returned = driver.expect();
                        prop_assert_eq!((returned.id, returned.written as usize), (id, bytes.len()));
                        prop_assert!(returned.data.starts_with(&bytes));
                        prop_assert!(returned.data[bytes.len()..].iter().all(|&byte| byte == 0xee));
                    }
                    prop_assert_eq!(driver.returned(), None);
                    driver.ask_for_interrupt();
                }
                _ => {}
            }
        }
        prop_assert_eq!(bench.signals.broken(), None);
    }

    /// Whatever is in memory, taking requests ends, and what comes out lies in RAM.
    #[test]
    fn no_memory_is_bad_enough(
        features in features(),
        size in prop_oneof![Just(1u16), Just(2), Just(3), Just(8), Just(256), any::<u16>()],
        addresses in prop::array::uniform3(prop_oneof![0u64..RAM as u64, any::<u64>()]),
        align in any::<bool>(),
        words in prop::collection::vec((0usize..0x800, any::<u64>()), 0..64),
        fill in any::<u8>(),
    ) {
        let memory = Arc::new(GuestMemory::on_heap(RAM));
        memory.fill(0, 1 << 20, fill).unwrap();
        let mask = if align { !15 } else { !0 };
        let [descriptors, driver, device] = addresses.map(|address| address & mask);
        // Some plausible descriptors: small addresses and lengths, every flag.
        for (place, word) in words {
            for base in [descriptors, driver] {
                let _ = memory.write(base.wrapping_add(place as u64 * 2), &word.to_le_bytes());
                let _ = memory.write(base.wrapping_add(place as u64 * 16), &(word & 0x7f_fff0).to_le_bytes());
            }
        }
        let dma = Dma::new(memory.clone());
        let layout = Layout { size, descriptors, driver, device };
        let Ok(mut ring) = Ring::new(&layout, features, &dma) else { return Ok(()) };
        for _ in 0..600 {
            match ring.pop(&dma) {
                Err(_) => break,
                Ok(None) => if !ring.arm(&dma) { break },
                Ok(Some(chain)) => {
                    let inside = |s: &crate::virtio::chain::Segment| {
                        s.length > 0 && s.offset + u64::from(s.length) <= memory.size()
                    };
                    prop_assert!(chain.readable_segments().iter().all(inside));
                    prop_assert!(chain.writable_segments().iter().all(inside));
                    ring.push(&dma, &[(chain.token, 1)]);
                    ring.wants_interrupt(&dma);
                }
            }
        }
    }
}

/// What a driver does wrong, and what is said of it.
#[test]
fn broken_rings_are_told_by_what_is_broken() {
    type Pieces = &'static [(u64, u32, u16)];
    let ram = RAM as u64;
    let outside = |gpa, length| RingError::Memory(crate::memory::OutsideRam { gpa, length });
    let direct: [(Pieces, RingError); 5] = [
        (&[(0x1000, 1, 2), (0x2000, 1, 0)], RingError::Order),
        (&[(RAM as u64 - 1, 2, 0)], outside(ram - 1, 2)),
        (&[(u64::MAX, 1, 2)], outside(u64::MAX, 1)),
        (&[(0x1000, 17, 4)], RingError::Table(17)),
        (&[(0x1000, 0, 4)], RingError::Table(0)),
    ];
    for packed in [0, RING_PACKED] {
        for (pieces, error) in &direct {
            let bench = Bench::new(packed);
            let (_, mut driver) = bench.queue(0, 8);
            let features = packed | INDIRECT_DESC;
            let dma = Dma::new(bench.memory.clone());
            let mut ring = Ring::new(&driver.layout, features, &dma).unwrap();
            driver.offer_raw(pieces);
            assert_eq!(ring.pop(&dma), Err(*error), "{pieces:x?} {packed}");
        }
        // Not negotiated.
        let bench = Bench::new(packed);
        let (queue, mut driver) = bench.queue(0, 8);
        driver.offer_raw(&[(0x1000, 16, 4)]);
        assert_eq!(queue.pop(), None);
        assert_eq!(
            bench.signals.broken().unwrap(),
            "queue 0: an indirect descriptor is where there must be none"
        );
        // The device does nothing more.
        driver.offer(&[b"x"], &[]);
        assert_eq!(queue.pop(), None);
        assert!(queue.lease().is_none());
    }
}

#[test]
fn a_loop_of_descriptors_has_an_end() {
    let bench = Bench::new(0);
    let (queue, driver) = bench.queue(0, 4);
    let memory = &bench.memory;
    for number in 0..4u64 {
        memory.store64(driver.layout.descriptors + 16 * number, 0x1000);
        memory.store64(driver.layout.descriptors + 16 * number + 8, 1 | 1 << 32 | (number + 1) % 4 << 48);
    }
    memory.store16(driver.layout.driver + 2, 1);
    assert_eq!(queue.pop(), None);
    assert_eq!(bench.signals.broken().unwrap(), "queue 0: a chain of descriptors is too long or has no end");
}

#[test]
fn more_than_the_ring_has_is_not_taken() {
    let bench = Bench::new(0);
    let (queue, mut driver) = bench.queue(0, 4);
    for _ in 0..4 {
        driver.offer(&[b"x"], &[]);
        assert!(queue.pop().is_some());
    }
    bench.memory.store16(driver.layout.driver + 2, 5);
    assert_eq!(queue.pop(), None);
    assert!(bench.signals.broken().unwrap().contains("5 entries"));
}

#[test]
fn what_was_taken_last_can_be_put_back() {
    for bench in Bench::all_kinds(0) {
        let (queue, mut driver) = bench.queue(0, 4);
        for round in 0..10u8 {
            let id = driver.offer(&[&[round]], &[]);
            let chain = queue.pop().unwrap();
            let after = queue.position();
            queue.unpop(&chain);
            assert_ne!(queue.position(), after);
            let chain = queue.pop().unwrap();
            assert_eq!((chain.token.id, queue.position()), (id, after));
            queue.complete(chain.token, 0);
            driver.expect();
        }
    }
}

#[test]
fn impossible_rings_are_refused() {
    let dma = Dma::new(Arc::new(GuestMemory::on_heap(0x1_0000)));
    let good = Layout { size: 8, descriptors: 0x1000, driver: 0x2000, device: 0x3000 };
    for features in [0, RING_PACKED] {
        assert!(Ring::new(&good, features, &dma).is_ok());
        for layout in [
            Layout { size: 0, ..good },
            Layout { size: 0x8001, ..good },
            Layout { descriptors: 0x1008, ..good },
            Layout { driver: 0x2001, ..good },
            Layout { device: 0x3002, ..good },
            Layout { descriptors: 0xfff0, ..good },
            Layout { driver: !15, ..good },
            Layout { device: 0x1_0000, ..good },
        ] {
            assert!(Ring::new(&layout, features, &dma).is_err(), "{layout:x?}");
        }
        let odd = Layout { size: 6, ..good };
        assert_eq!(Ring::new(&odd, features, &dma).is_ok(), features != 0);
        let mut ring = Ring::new(&good, features, &dma).unwrap();
        let far = Position { available: 8, used: 0, unsignalled: 0 };
        assert_eq!(ring.set_position(far), features == 0);
    }
}
