//! What the test guests do otherwise in QEMU's emulation of AMD-V, whoever uses it: our hypervisor for the bare machine, or
//! Linux' KVM under the engine kvm.
use bivisor_guests::{Guest, Verdict};

/// Names of checks that may fail, one a line, by guest.
pub type Excused = &'static [(&'static str, &'static str)];

/// QEMU marks PAE's directory pointers as accessed under nested paging, and whoever loads them later finds that reserved.
const BY_QEMU: Excused = &[(
    "paging",
    "PAE: ring 3 fetches\nPAE: ring 3 writes\nPAE: and makes the page dirty\nPAE: an absent directory\n\
     PAE: a fetch of it\nPAE: ring 3 fetches no-execute\nPAE: ring 3 writes read-only\n",
)];

/// The checks of a guest that may fail: those that fail on QEMU without a hypervisor, those that fail by [`BY_QEMU`], and the
/// hypervisor's own.
pub fn checks(guest: &Guest, own: Excused) -> String {
    format!("{}\n{}{}", guest.qemu_differs, of(guest, BY_QEMU), of(guest, own))
}

/// Those of a list.
pub fn of(guest: &Guest, list: Excused) -> &'static str {
    list.iter().find(|(name, _)| *name == guest.name).map_or("", |(_, checks)| *checks)
}

/// Whether a guest that ended with this status came to a good end: power-off, or the verdict "passed" at port 0xf4
/// (2 * 0x10 + 1), or "failed" (2 * 0x11 + 1) where checks that may fail did.
pub fn is_good_end(verdict: &Verdict, status: i32) -> bool {
    matches!(status, 0 | 33) || status == 35 && !verdict.skipped.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bivisor_guests::{ALL, HELLO};

    #[test]
    fn a_failure_is_only_a_good_end_where_a_check_may_fail() {
        let clean = Verdict::default();
        let excused = Verdict { skipped: vec!["one".into()], ..Verdict::default() };
        assert_eq!([0, 33, 35, 1].map(|status| is_good_end(&clean, status)), [true, true, false, false]);
        assert_eq!([0, 33, 35, 1].map(|status| is_good_end(&excused, status)), [true, true, true, false]);
    }

    #[test]
    fn a_guest_has_its_own_excuses() {
        let own: Excused = &[("hello", "a check")];
        let paging = ALL.iter().find(|guest| guest.name == "paging").unwrap();
        assert!(
            checks(paging, own).contains("PAE: ring 3 fetches\n") && !checks(paging, own).contains("a check")
        );
        assert!(checks(&HELLO, own).lines().any(|line| line == "a check"));
    }
}
