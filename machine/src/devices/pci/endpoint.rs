//! What every PCI function of this machine has: a header, one 64-bit memory BAR that the guest can move, MSI-X in that
//! BAR, and an interrupt pin for systems without MSI-X.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use super::msix::{self, ENTRY_SIZE, Msix};
use super::{ConfigSpace, register};
use crate::bus::MmioMap;
use crate::device::{IrqLine, Mmio};
use crate::devices::{Registers, RestoreError, Saved};
use crate::irq::Interrupts;
use crate::sync::Mutex;

/// Command: the function's memory BARs are decoded.
const MEMORY_SPACE: u32 = 1 << 1;
/// Command: the function may access memory.
const BUS_MASTER: u32 = 1 << 2;
/// Command: the interrupt pin stays quiet.
const INTERRUPT_DISABLE: u32 = 1 << 10;
/// Status: the function wants an interrupt by its pin.
const INTERRUPT_STATUS: u8 = 1 << 3;
/// BAR: 64 bits wide.
const BAR_64_BIT: u64 = 0b100;
/// Bits of a 64-bit BAR that are no address.
const BAR_FLAGS: u64 = 0xf;
/// Offset of message control in the MSI-X capability.
const MESSAGE_CONTROL: usize = 2;

/// What an endpoint is made with.
pub struct EndpointParts {
    /// Identity and capabilities of the device's own.
    pub config: ConfigSpace,
    /// What answers in BAR 0.
    pub registers: Weak<dyn Mmio>,
    /// Where BAR 0 is mapped.
    pub mmio: Arc<MmioMap>,
    /// Where messages go.
    pub interrupts: Arc<Interrupts>,
    /// The interrupt pin's wire.
    pub wire: Arc<dyn IrqLine>,
    /// Number of MSI-X vectors.
    pub vectors: u16,
    /// Bytes of BAR 0, a power of two.
    pub bar_size: u64,
    /// Where firmware has put BAR 0.
    pub bar_address: u64,
    /// Offset in BAR 0 of the MSI-X table.
    pub table: u32,
    /// Offset in BAR 0 of the pending bits.
    pub pending: u32,
}

struct State {
    config: ConfigSpace,
    msix: Msix,
    /// Where BAR 0 answers now.
    mapped: Option<u64>,
    /// The device wants an interrupt by its pin.
    wants_pin: bool,
}

/// BAR 0 in the memory map, which outlives no function.
struct Region(Weak<dyn Mmio>);

impl Mmio for Region {
    fn mmio_read(&self, offset: u64, size: usize) -> u64 {
        self.0.upgrade().map_or(u64::MAX, |registers| registers.mmio_read(offset, size))
    }
    fn mmio_write(&self, offset: u64, size: usize, value: u64) {
        if let Some(registers) = self.0.upgrade() {
            registers.mmio_write(offset, size, value);
        }
    }
}

/// The part of a function that has nothing to do with what it is for.
pub struct Endpoint {
    state: Mutex<State>,
    region: Arc<dyn Mmio>,
    /// The map leads to the bus and so to this function: an `Arc` would keep all of them, and RAM, for ever.
    mmio: Weak<MmioMap>,
    interrupts: Arc<Interrupts>,
    wire: Arc<dyn IrqLine>,
    bar_size: u64,
    capability: usize,
}

/// What [`Endpoint::save`] gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedEndpoint {
    /// What software has set in configuration space.
    pub config: Vec<u8>,
    /// MSI-X.
    pub msix: Saved<Msix>,
}

impl Endpoint {
    /// An endpoint as firmware leaves it: its BAR has an address, but nothing is enabled.
    pub fn new(parts: EndpointParts) -> Self {
        let EndpointParts { mut config, registers, mmio, interrupts, wire, bar_size, .. } = parts;
        let msix = Msix::new(parts.vectors);
        config.set_writable(
            register::COMMAND,
            &((MEMORY_SPACE | BUS_MASTER | INTERRUPT_DISABLE) as u16).to_le_bytes(),
        );
        config.set(register::BAR0, &(parts.bar_address | BAR_64_BIT).to_le_bytes());
        config.set_writable(register::BAR0, &(!(bar_size - 1) & !BAR_FLAGS).to_le_bytes());
        config.set(register::INTERRUPT_PIN, &[1]);
        config.set_writable(register::INTERRUPT_LINE, &[0xff]);
        // Message control (the table's size less one), then table and pending bits, both in BAR 0.
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(msix.vectors() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&parts.table.to_le_bytes());
        body[6..].copy_from_slice(&parts.pending.to_le_bytes());
        let capability = config.add_capability(msix::CAPABILITY, &body);
        config
            .set_writable(capability + MESSAGE_CONTROL, &(msix::ENABLE | msix::FUNCTION_MASK).to_le_bytes());
        let state = State { config, msix, mapped: None, wants_pin: false };
        let region = Arc::new(Region(registers));
        let mmio = Arc::downgrade(&mmio);
        Self { state: Mutex::new(state), region, mmio, interrupts, wire, bar_size, capability }
    }

    fn send(&self) -> impl FnMut(msix::Sent) {
        |(address, data)| {
            // Software may have written any address: what is no interrupt leads nowhere.
            self.interrupts.send_msi(address, data);
        }
    }

    /// Reads configuration space.
    pub fn config_read(&self, offset: usize, size: usize) -> u32 {
        self.state.lock().config.read(offset, size)
    }

    /// Writes configuration space. Says whether the function may access memory from now on and might not before.
    pub fn config_write(&self, offset: usize, size: usize, value: u32) -> bool {
        let mut state = self.state.lock();
        let before = state.config.read(register::COMMAND, 2);
        state.config.write(offset, size, value);
        self.follow(&mut state);
        state.config.read(register::COMMAND, 2) & !before & BUS_MASTER != 0
    }

    /// Lets BAR, messages and pin follow configuration space.
    fn follow(&self, state: &mut State) {
        let command = state.config.read(register::COMMAND, 2);
        let low = u64::from(state.config.read(register::BAR0, 4));
        let address = u64::from(state.config.read(register::BAR0 + 4, 4)) << 32 | low & !BAR_FLAGS;
        let wanted = (command & MEMORY_SPACE != 0).then_some(address);
        if state.mapped != wanted
            && let Some(mmio) = self.mmio.upgrade()
        {
            if let Some(address) = state.mapped.take() {
                mmio.remove(address);
            }
            // Where another device answers, this one stays silent; the next write tries again.
            state.mapped =
                wanted.filter(|&address| mmio.insert(address, self.bar_size, self.region.clone()).is_ok());
        }
        let control = state.config.read(self.capability + MESSAGE_CONTROL, 2) as u16;
        state.msix.set_control(control, command & BUS_MASTER != 0, &mut self.send());
        self.drive_pin(state);
    }

    fn drive_pin(&self, state: &mut State) {
        let wants = state.wants_pin && !state.msix.enabled();
        let status = state.config.read(register::STATUS, 1) as u8 & !INTERRUPT_STATUS;
        state.config.set(register::STATUS, &[if wants { status | INTERRUPT_STATUS } else { status }]);
        let quiet = state.config.read(register::COMMAND, 2) & INTERRUPT_DISABLE != 0;
        self.wire.set(wants && !quiet);
    }

    /// Whether the function may access memory.
    pub fn is_bus_master(&self) -> bool {
        self.state.lock().config.read(register::COMMAND, 2) & BUS_MASTER != 0
    }
    /// Whether messages are used instead of the pin.
    pub fn uses_messages(&self) -> bool {
        self.state.lock().msix.enabled()
    }
    /// Number of MSI-X vectors.
    pub fn vectors(&self) -> u16 {
        self.state.lock().msix.vectors()
    }
    /// Sends the message of a vector.
    pub fn trigger(&self, vector: u16) {
        self.state.lock().msix.trigger(vector, &mut self.send());
    }
    /// Says whether the device wants an interrupt by its pin.
    pub fn set_pin(&self, wants: bool) {
        let mut state = self.state.lock();
        state.wants_pin = wants;
        self.drive_pin(&mut state);
    }

    /// Reads the MSI-X table.
    pub fn table_read(&self, offset: u64, size: usize) -> u64 {
        self.state.lock().msix.read_table(offset, size)
    }
    /// Writes the MSI-X table.
    pub fn table_write(&self, offset: u64, size: usize, value: u64) {
        self.state.lock().msix.write_table(offset, size, value, &mut self.send());
    }
    /// Reads the pending bits.
    pub fn pending_read(&self, offset: u64, size: usize) -> u64 {
        self.state.lock().msix.read_pending(offset, size)
    }

    /// What software has set.
    pub fn save(&self) -> SavedEndpoint {
        let state = self.state.lock();
        SavedEndpoint { config: state.config.changeable(), msix: state.msix.save() }
    }

    /// Takes over what [`Endpoint::save`] gave.
    pub fn restore(&self, saved: &SavedEndpoint) -> Result<(), RestoreError> {
        let mut state = self.state.lock();
        if saved.msix.registers.vectors() != state.msix.vectors() {
            return Err(RestoreError::Invalid);
        }
        state.msix.restore(&saved.msix)?;
        state.config.set_changeable(&saved.config);
        state.wants_pin = false;
        self.follow(&mut state);
        Ok(())
    }
}

/// Bytes that a table of this many vectors takes.
pub const fn table_size(vectors: u16) -> u64 {
    vectors as u64 * ENTRY_SIZE
}
