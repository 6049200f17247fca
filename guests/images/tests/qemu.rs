//! The guests on QEMU's TCG: a check of the guests themselves against an emulator that nobody here wrote.
use bivisor_guests::{ALL, Guest, LOST, TRIPLE_FAULTS, run};
use std::{env, fs, process::Command, time::Duration};

/// Ends of a run that count as good: power-off, and the verdict "passed" through isa-debug-exit (2 * 0x10 + 1).
const GOOD_ENDS: [i32; 2] = [0, 33];

fn on_qemu(guest: &Guest) -> Result<(), String> {
    let image = env::temp_dir().join(format!("bivisor-qemu-{}-{}", guest.name, std::process::id()));
    fs::write(&image, guest.image).map_err(|e| format!("{}: {e}", image.display()))?;
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-cpu", "max", "-m", "64", "-nodefaults", "-display", "none", "-no-reboot"]);
    qemu.args(["-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-kernel"])
        .arg(&image);
    let outcome = run(guest, &mut qemu, Duration::from_secs(60));
    // Left behind in the temporary folder it would do no harm.
    let _ = fs::remove_file(&image);
    let outcome = outcome.map_err(|e| format!("qemu-system-x86_64: {e}"))?;
    let verdict = outcome.compare(guest, guest.qemu_differs);
    let code = outcome.status.and_then(|status| status.code());
    println!("{}: {} passed, skipped or excused: {:?}", guest.name, verdict.passed, verdict.skipped);
    let failed_as_excused = code == Some(35) && !verdict.skipped.is_empty();
    if verdict.differences.is_empty()
        && (code.is_some_and(|code| GOOD_ENDS.contains(&code)) || failed_as_excused)
    {
        return Ok(());
    }
    Err(format!("{}: status {code:?}\n{}\n{}", guest.name, verdict.differences.join("\n"), outcome.messages))
}

fn has_qemu() -> bool {
    let found = Command::new("qemu-system-x86_64").arg("--version").output().is_ok();
    if !found {
        println!("skipped: qemu-system-x86_64 is not installed (Debian: apt-get install qemu-system-x86)");
    }
    found
}

#[test]
fn every_guest_passes_on_qemu() {
    if has_qemu() {
        let failures: Vec<String> = ALL.iter().filter_map(|guest| on_qemu(guest).err()).collect();
        assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    }
}

#[test]
fn triple_faults_reset_qemu() {
    // QEMU's TCG looks at no limit of a task, and goes to addresses that are none.
    let ways = TRIPLE_FAULTS.iter().filter(|way| !matches!(**way, "7" | "8"));
    if has_qemu() {
        let failures: Vec<String> =
            ways.filter_map(|way| on_qemu(&Guest { input: way, ..LOST }).err()).collect();
        assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    }
}
