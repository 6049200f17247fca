//! The machine that everything runs on: what it is, and how busy it is.
use std::{
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// Ticks in a second of `/proc/stat` and `/proc/PID/stat`: USER_HZ, which is 100 on x86.
const TICKS: f64 = 100.0;
/// A host is quiet when it keeps less than this many CPUs busy.
const QUIET: f64 = 0.15;

/// Today, in UTC, as year-month-day.
pub fn date() -> String {
    output_of(Command::new("date").args(["-u", "+%Y-%m-%d"])).unwrap_or_else(|| "date unknown".into())
}

/// The kernel's release.
pub fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown".into(), |text| text.trim().into())
}

/// The processor's name, with family and model, which many a cloud's name for it leaves out.
pub fn cpu_model() -> String {
    parse_cpu(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn parse_cpu(text: &str) -> String {
    let field = |name: &str| {
        let line = text.lines().find(|line| line.split('\t').next() == Some(name))?;
        Some(line.split_once(": ")?.1.trim().to_owned())
    };
    let name = field("model name").unwrap_or_else(|| "unknown CPU".into());
    match (field("cpu family"), field("model")) {
        (Some(family), Some(model)) => format!("{name} (family {family}, model {model})"),
        _ => name,
    }
}

/// CPUs that this process may use.
pub fn cpu_count() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// The commit that is checked out, with a plus sign if files differ from it.
pub fn commit(root: &Path) -> String {
    let git = |arguments: &[&str]| output_of(Command::new("git").current_dir(root).args(arguments));
    let Some(commit) = git(&["rev-parse", "--short=10", "HEAD"]) else { return "unknown".into() };
    let changed = git(&["status", "--porcelain"]).is_some_and(|text| !text.is_empty());
    format!("{commit}{}", if changed { "+" } else { "" })
}

/// What a command writes, without the line's end, if it succeeds.
pub fn output_of(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// Processor time, in seconds: of everything on this host, and of this process with all its children that ended.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Busy {
    all: f64,
    own: f64,
}

impl Busy {
    fn now() -> Self {
        Self {
            all: parse_stat(&fs::read_to_string("/proc/stat").unwrap_or_default()).unwrap_or_default(),
            own: parse_self(&fs::read_to_string("/proc/self/stat").unwrap_or_default()).unwrap_or_default(),
        }
    }
}

/// Busy seconds from `/proc/stat`: user, nice, system, irq, softirq. Steal is the host's hypervisor's.
fn parse_stat(text: &str) -> Option<f64> {
    let fields: Vec<f64> =
        text.lines().next()?.split_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    Some([0, 1, 2, 5, 6].iter().filter_map(|&index| fields.get(index)).sum::<f64>() / TICKS)
}

/// utime, stime, cutime, cstime from `/proc/self/stat`, whose second field may hold anything.
fn parse_self(text: &str) -> Option<f64> {
    let fields = text.rsplit_once(')')?.1.split_whitespace();
    Some(fields.skip(11).take(4).filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / TICKS)
}

/// How many CPUs others kept busy since a moment.
pub struct Watch {
    start: Instant,
    busy: Busy,
}

impl Watch {
    /// From now on.
    pub fn start() -> Self {
        Self { start: Instant::now(), busy: Busy::now() }
    }

    /// CPUs that were kept busy on average, by others than this process and its children that have ended.
    pub fn foreign_load(&self) -> f64 {
        let now = Busy::now();
        let foreign = (now.all - self.busy.all) - (now.own - self.busy.own);
        (foreign / self.start.elapsed().as_secs_f64().max(0.01)).max(0.0)
    }
}

/// A TCP port of the loopback address that nobody uses now.
pub fn free_port() -> std::io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// Waits until the host is quiet, at most so long; says how many CPUs others kept busy in the end.
pub fn wait_until_quiet(patience: Duration) -> f64 {
    let start = Instant::now();
    let mut load = 0.0;
    while start.elapsed() < patience {
        let watch = Watch::start();
        thread::sleep(Duration::from_secs(1).min(patience));
        load = watch.foreign_load();
        if load < QUIET {
            break;
        }
    }
    load
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_times_are_read() {
        let stat = "cpu  100 20 30 9000 50 6 7 80 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n";
        assert_eq!(parse_stat(stat), Some(1.63));
        let own = "12 (a ) b) S 1 12 12 0 -1 4194304 100 200 0 0 150 50 250 50 20 0 1 0 100 1 1";
        assert_eq!(parse_self(own), Some(5.0));
        assert_eq!((parse_stat(""), parse_self("")), (None, None));
    }

    #[test]
    fn processors_have_names() {
        let text = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n";
        assert_eq!(parse_cpu(text), "AMD EPYC (family 25, model 17)");
        assert_eq!(parse_cpu(""), "unknown CPU");
    }

    #[test]
    fn load_of_our_own_children_is_not_foreign() {
        let watch = Watch::start();
        let script = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";
        assert!(Command::new("sh").args(["-c", script]).status().unwrap().success());
        let (busy, own) = (Busy::now(), watch.busy.own);
        assert!(busy.own > own, "the child's time is counted");
    }
}
