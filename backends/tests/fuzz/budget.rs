//! How long a fuzz test runs, where its numbers begin, and who tells when it goes wrong.

use std::env;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Seconds that a test runs, if it is to run longer than among all the others: `cargo xtask fuzz --seconds N`.
const SECONDS: &str = "BIVISOR_FUZZ_SECONDS";
/// The first round's number; each round's random numbers begin with its own.
const SEED: &str = "BIVISOR_FUZZ_SEED";
/// Time of a test among all the others.
const SHORT: Duration = Duration::from_secs(2);
/// A round that takes longer hangs.
const HANGING: Duration = Duration::from_secs(60);

fn number(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

/// Says which round it was, if a test fails in it.
struct Round {
    name: &'static str,
    seed: u64,
}

impl Drop for Round {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("{}: failed in the round {SEED}={}", self.name, self.seed);
        }
    }
}

/// Runs rounds until the time is up; each gets random numbers of its own. At least one is run.
pub fn rounds(name: &'static str, mut round: impl FnMut(&mut fastrand::Rng)) {
    let first = number(SEED).unwrap_or(1);
    let time = number(SECONDS).map_or(SHORT, Duration::from_secs);
    let current = Arc::new(AtomicU64::new(first));
    watch(name, &current);
    let end = Instant::now() + time;
    let mut seed = first;
    loop {
        let told = Round { name, seed };
        round(&mut fastrand::Rng::with_seed(seed));
        drop(told);
        seed += 1;
        current.store(seed, Ordering::SeqCst);
        if Instant::now() >= end {
            break;
        }
    }
    current.store(u64::MAX, Ordering::SeqCst);
    println!("{name}: {} rounds in {time:?}", seed - first);
}

/// Ends the process if a round doesn't end.
fn watch(name: &'static str, current: &Arc<AtomicU64>) {
    let current = current.clone();
    thread::spawn(move || {
        let (mut seen, mut since) = (0, Instant::now());
        loop {
            thread::sleep(Duration::from_millis(500));
            let seed = current.load(Ordering::SeqCst);
            if seed == u64::MAX {
                return;
            }
            if seed != seen {
                (seen, since) = (seed, Instant::now());
            } else if since.elapsed() > HANGING {
                println!("{name}: the round {SEED}={seed} does not end");
                std::process::exit(1);
            }
        }
    });
}
