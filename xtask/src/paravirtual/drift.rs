//! How far guests' clocks go away from the host's.
use super::GUESTS;
use crate::{console::Session, linux::PROMPT};
use anyhow::{Context, Result};
use std::{
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// What a boot may take.
const LIMIT: Duration = Duration::from_secs(240);
/// What a guest's clock may lose or gain.
const ALLOWED: Duration = Duration::from_millis(1);
/// Readings of which the best is taken: the others came late.
const READINGS: u32 = 100;
/// How often there is a look.
const PERIOD: Duration = Duration::from_secs(60);

struct Watched {
    name: &'static str,
    session: Session,
    /// By how many nanoseconds the guest's clock was ahead at first.
    first: i128,
    drift: i128,
}

pub fn watch(program: &Path, engine: &str, time: Duration) -> Result<bool> {
    let origin = Instant::now();
    let mut all = Vec::new();
    for (name, pv) in GUESTS {
        let mut command = Command::new(program);
        command.args(["run", "--no-reboot", "--memory", "256M", "--engine", engine, "--pv", pv]);
        let mut session = Session::start(&mut command, Instant::now() + LIMIT)?;
        session.screen.until(PROMPT)?;
        let first = ahead(&mut session, origin)?;
        all.push(Watched { name, session, first, drift: 0 });
    }
    let start = Instant::now();
    while start.elapsed() < time {
        thread::sleep(PERIOD.min(time.saturating_sub(start.elapsed())));
        for Watched { name, session, first, drift } in &mut all {
            *drift = ahead(session, origin)? - *first;
            println!("    {name}: {:+.3} ms after {:.0?}", *drift as f64 / 1e6, start.elapsed());
        }
    }
    Ok(all.iter().all(|watched| watched.drift.unsigned_abs() < ALLOWED.as_nanos()))
}

/// By how many nanoseconds the guest's clock is ahead of the host's time since `origin`, but for a difference that is always the
/// same: what comes late makes it seem behind, so the largest counts.
fn ahead(session: &mut Session, origin: Instant) -> Result<i128> {
    let mut best = i128::MIN;
    for _ in 0..READINGS {
        session.screen.set_deadline(Instant::now() + LIMIT);
        session.type_line("head -n 3 /proc/timer_list")?;
        session.screen.until("now at ")?;
        let guest = session.screen.until(" ")?;
        let host = origin.elapsed().as_nanos() as i128;
        let guest: i128 = guest.trim().parse().context("the guest's time")?;
        best = best.max(guest - host);
        session.screen.until(PROMPT)?;
    }
    Ok(best)
}
