//! The ACPI power management registers (ACPI Specification 6.5, section 4.8): PM1 event and control blocks, the
//! power management timer, one general-purpose event block.

use alloc::sync::Arc;

use super::log::GuestLog;
use super::reset::sleep;
use super::{Registers, RestoreError, Saved};
use crate::device::{IrqLine, PortIo};
use crate::host::{Clock, EventSink, Nanos};
use crate::sync::Mutex;

/// First port of the block.
pub const BASE: u16 = 0x600;
/// Ports of the block.
pub const PORTS: u32 = 0x30;
/// PM1a event block: status and enable, 2 bytes each.
pub const PM1_EVENT: u16 = BASE;
/// Bytes of the PM1a event block.
pub const PM1_EVENT_LENGTH: u8 = 4;
/// PM1a control block.
pub const PM1_CONTROL: u16 = BASE + 4;
/// Bytes of the PM1a control block.
pub const PM1_CONTROL_LENGTH: u8 = 2;
/// The power management timer, 32 bits wide.
pub const PM_TIMER: u16 = BASE + 8;
/// Bytes of the timer.
pub const PM_TIMER_LENGTH: u8 = 4;
/// General-purpose event block 0: status, then enable.
pub const GPE0: u16 = BASE + 0x20;
/// Bytes of GPE0: 16 events' status and enable.
pub const GPE0_LENGTH: u8 = 4;
/// The interrupt line of the system control interrupt, level triggered.
pub const SCI: usize = 9;
/// SLP_TYPx of the soft-off state, for the `\_S5` object.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Timer frequency 3.579545 MHz: 315/88 MHz exactly.
const TIMER_NUMERATOR: u128 = 315;
const TIMER_DENOMINATOR: u128 = 88_000;

const STATUS_TIMER: u16 = 1 << 0;
const STATUS_GLOBAL: u16 = 1 << 5;
const STATUS_POWER_BUTTON: u16 = 1 << 8;
const STATUS_SLEEP_BUTTON: u16 = 1 << 9;
const STATUS_RTC: u16 = 1 << 10;
const STATUS_WAKE: u16 = 1 << 15;
const STATUS_WRITABLE: u16 =
    STATUS_TIMER | STATUS_GLOBAL | STATUS_POWER_BUTTON | STATUS_SLEEP_BUTTON | STATUS_RTC | STATUS_WAKE;
const ENABLE_WRITABLE: u16 = STATUS_WRITABLE & !STATUS_WAKE;

const CONTROL_SCI_ENABLED: u16 = 1 << 0;
const CONTROL_SLEEP_ENABLE: u16 = 1 << 13;
/// Bus master reload, sleep type.
const CONTROL_WRITABLE: u16 = 0x1c02;

/// The register machine. The timer's carry is not an event: its status bit stays clear, since the machine's
/// FADT offers 32 bits, which wrap only every 20 minutes and which software reads by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AcpiPm {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
}

impl Registers for AcpiPm {
    const VERSION: u32 = 1;
}

impl AcpiPm {
    /// Level of the system control interrupt.
    pub fn sci(&self) -> bool {
        self.status & self.enable != 0 || self.gpe_status & self.gpe_enable != 0
    }
    /// Somebody presses the power button.
    pub fn press_power_button(&mut self) {
        self.status |= STATUS_POWER_BUTTON;
    }
    /// A general-purpose event (0 to 15) happens.
    pub fn raise_gpe(&mut self, event: u32) {
        self.gpe_status |= 1u16.checked_shl(event).unwrap_or(0);
    }

    fn timer(now: Nanos) -> u32 {
        (u128::from(now) * TIMER_NUMERATOR / TIMER_DENOMINATOR) as u32
    }

    /// Reads a byte of the block.
    pub fn read(&self, offset: u16, now: Nanos) -> u8 {
        let half = |register: u16| (register >> (8 * (offset & 1))) as u8;
        match offset {
            0 | 1 => half(self.status),
            2 | 3 => half(self.enable),
            // There is no SMI command, so ACPI mode is always on.
            4 | 5 => half(self.control | CONTROL_SCI_ENABLED),
            8..12 => (Self::timer(now) >> (8 * (offset & 3))) as u8,
            0x20 | 0x21 => half(self.gpe_status),
            0x22 | 0x23 => half(self.gpe_enable),
            _ => 0,
        }
    }

    /// Writes a byte of the block. Returns the sleep type if the guest wants to sleep.
    pub fn write(&mut self, offset: u16, value: u8) -> Option<u8> {
        let shift = 8 * (offset & 1);
        let wide = u16::from(value) << shift;
        let replace = |register: u16| register & !(0xff << shift) | wide;
        match offset {
            0 | 1 => self.status &= !(wide & STATUS_WRITABLE),
            2 | 3 => self.enable = replace(self.enable) & ENABLE_WRITABLE,
            4 | 5 => {
                self.control = replace(self.control) & CONTROL_WRITABLE;
                if wide & CONTROL_SLEEP_ENABLE != 0 {
                    return Some((self.control >> 10 & 7) as u8);
                }
            }
            0x20 | 0x21 => self.gpe_status &= !wide,
            0x22 | 0x23 => self.gpe_enable = replace(self.gpe_enable),
            _ => {}
        }
        None
    }
}

/// The block on its ports and its interrupt.
pub struct PowerManagement {
    registers: Mutex<AcpiPm>,
    sci: Arc<dyn IrqLine>,
    clock: Arc<dyn Clock>,
    sink: Arc<dyn EventSink>,
    log: Arc<GuestLog>,
}

impl PowerManagement {
    /// The block after reset.
    pub fn new(
        sci: Arc<dyn IrqLine>,
        clock: Arc<dyn Clock>,
        sink: Arc<dyn EventSink>,
        log: Arc<GuestLog>,
    ) -> Arc<Self> {
        Arc::new(Self { registers: Mutex::default(), sci, clock, sink, log })
    }
    fn update<R>(&self, change: impl FnOnce(&mut AcpiPm) -> R) -> R {
        let mut registers = self.registers.lock();
        let result = change(&mut registers);
        self.sci.set(registers.sci());
        result
    }
    /// Somebody presses the power button: a guest that knows ACPI powers itself off.
    pub fn press_power_button(&self) {
        self.update(AcpiPm::press_power_button);
    }
    /// A general-purpose event (0 to 15) happens.
    pub fn raise_gpe(&self, event: u32) {
        self.update(|registers| registers.raise_gpe(event));
    }
    /// A copy of the registers.
    pub fn save(&self) -> Saved<AcpiPm> {
        self.registers.lock().save()
    }
    /// Takes over saved registers.
    pub fn restore(&self, saved: &Saved<AcpiPm>) -> Result<(), RestoreError> {
        self.update(|registers| registers.restore(saved))
    }
}

impl PortIo for PowerManagement {
    fn port_read(&self, port: u16, size: usize) -> u32 {
        let now = self.clock.now();
        let registers = self.registers.lock();
        let offset = port.wrapping_sub(BASE);
        (0..size as u16).fold(0, |value, i| {
            value | u32::from(registers.read(offset.wrapping_add(i), now)) << (8 * u32::from(i))
        })
    }
    fn port_write(&self, port: u16, size: usize, value: u32) {
        let offset = port.wrapping_sub(BASE);
        let slept = self.update(|registers| {
            let bytes = value.to_le_bytes();
            // High byte last, so that a sleep type is complete when sleep is enabled.
            bytes
                .iter()
                .zip(0u16..)
                .take(size)
                .filter_map(|(&byte, i)| registers.write(offset.wrapping_add(i), byte))
                .last()
        });
        if let Some(sleep_type) = slept {
            sleep(&*self.sink, &self.log, sleep_type, SLEEP_TYPE_S5);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Host, Time};
    use crate::host::MachineEvent;

    #[test]
    fn the_power_button_is_status_and_interrupt() {
        let mut pm = AcpiPm::default();
        pm.press_power_button();
        assert_eq!((pm.read(1, 0), pm.sci()), (1, false));
        pm.write(3, 1);
        assert!(pm.sci());
        pm.write(1, 0);
        assert!(pm.sci());
        pm.write(1, 1);
        assert_eq!((pm.read(1, 0), pm.sci()), (0, false));
    }

    #[test]
    fn the_timer_counts_at_its_frequency() {
        assert_eq!(AcpiPm::timer(1_000_000_000), 3_579_545);
        assert_eq!(AcpiPm::timer(u64::MAX), (u128::from(u64::MAX) * 315 / 88_000) as u32);
        let pm = AcpiPm::default();
        assert_eq!((pm.read(8, 1_000_000), pm.read(9, 1_000_000)), (0xfb, 0x0d));
    }

    #[test]
    fn general_purpose_events() {
        let mut pm = AcpiPm::default();
        pm.raise_gpe(9);
        pm.raise_gpe(99);
        pm.write(0x23, 2);
        assert_eq!((pm.read(0x21, 0), pm.sci()), (2, true));
        pm.write(0x21, 2);
        assert!(!pm.sci());
    }

    #[test]
    fn acpi_mode_is_always_on_and_sleep_enable_reads_zero() {
        let mut pm = AcpiPm::default();
        pm.write(4, 0);
        assert_eq!(pm.read(4, 0), 1);
        assert_eq!(pm.write(5, 0x34), Some(5));
        assert_eq!(pm.read(5, 0), 0x14);
    }

    #[test]
    fn soft_off_reaches_the_host_and_other_sleeps_the_log() {
        let (host, time) = (Host::new(), Time::new());
        let log = GuestLog::new(host.clone(), time.clone());
        let pm = PowerManagement::new(host.clone(), time, host.clone(), log);
        pm.port_write(PM1_CONTROL, 2, 1 << 13 | 3 << 10);
        assert_eq!((host.events().len(), host.lines().len()), (0, 1));
        pm.port_write(PM1_CONTROL, 2, 1 << 13 | 5 << 10);
        assert_eq!(host.events(), [MachineEvent::PowerOff]);
        pm.port_write(PM1_EVENT + 2, 2, 0x100);
        pm.press_power_button();
        assert_eq!(host.levels().last(), Some(&true));
        assert_eq!(pm.port_read(PM1_EVENT, 4), 0x0100_0100);
    }

    #[test]
    fn save_and_restore() {
        let mut pm = AcpiPm::default();
        pm.press_power_button();
        let mut other = AcpiPm::default();
        other.restore(&pm.save()).unwrap();
        assert_eq!(other, pm);
    }
}
