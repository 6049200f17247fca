//! Names of translated code, for tools that look at the host.

use bivisor_machine::engine::CodeMap;

use super::key::{Key, USER};

/// Somebody who hears of translated code, or nobody.
#[derive(Default)]
pub struct Names(Option<Box<dyn CodeMap>>);

impl Names {
    /// Tells this one from now on. `shared`: address and size of the code that all blocks share.
    pub fn set(&mut self, mut map: Box<dyn CodeMap>, (address, size): (u64, u64)) {
        map.made(address, size, "dbt:shared".into());
        self.0 = Some(map);
    }

    /// A block stands at an address. `linear`: where the guest has it.
    pub fn made(&mut self, address: u64, size: u64, linear: u64, key: Key) {
        if let Some(map) = &mut self.0 {
            let class = if key.class() == USER { "user" } else { "kernel" };
            map.made(address, size, format!("guest:{linear:x}:{class}"));
        }
    }

    /// All blocks went.
    pub fn cleared(&mut self) {
        if let Some(map) = &mut self.0 {
            map.cleared();
        }
    }
}
