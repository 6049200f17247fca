//! UEFI (UEFI Specification 2.10): the image is an application in the EFI system partition, the machines are a file beside it.
#![allow(unsafe_code)]

use core::ffi::c_void;
use core::{ptr, slice};

use uefi_raw::protocol::file_system::{
    FileAttribute, FileInfo, FileMode, FileProtocolV1, SimpleFileSystemProtocol,
};
use uefi_raw::protocol::loaded_image::LoadedImageProtocol;
use uefi_raw::table::boot::{AllocateType, BootServices, MemoryDescriptor, MemoryType};
use uefi_raw::table::system::SystemTable;
use uefi_raw::{Guid, Handle, Status, guid};

use super::{AcpiRoot, BootInfo, Identity, Range};

/// Where the machines are on the partition that the image was loaded from.
const MACHINES: &str = "\\bivisor\\machines";
/// Everything that is used after the firmware lies below, in what the entry code maps.
const MAPPED_END: u64 = 1 << 32;
const PAGE: u64 = 4096;
/// Room in the memory map for what comes up while it is asked for.
const SPARE_DESCRIPTORS: usize = 16;
/// Names of the configuration tables that are ACPI's root pointers (UEFI Specification, 4.6).
const ACPI_20: Guid = guid!("8868e871-e4f1-11d3-bc22-0080c73c8881");
const ACPI_10: Guid = guid!("eb9d2d30-2d88-11d3-9a16-0090273fc14d");
const FAILED: u64 = 1 << 32;

/// Why the firmware keeps the machine: in words, with what a call of it returned.
struct Refusal(&'static str, Status);

/// Called by the entry code: loads the machines, ends the firmware's boot services, and returns the address of the
/// [`BootInfo`], below 4 GiB; or more than that, if it has failed, has said so, and the firmware goes on.
///
/// # Safety
/// The firmware has called the entry code with these arguments.
pub unsafe extern "efiapi" fn main(image: Handle, system: *const SystemTable) -> u64 {
    // SAFETY: the caller's promise: so the tables are there, and have the layout that UEFI says, until boot services end.
    unsafe {
        match leave(image, &*system) {
            Ok(info) => info as u64,
            Err(Refusal(what, status)) => {
                say(&*system, what);
                say(&*system, status_name(status));
                FAILED
            }
        }
    }
}

/// What [`main`] has left.
///
/// # Safety
/// The address is what [`main`] has returned.
pub(super) unsafe fn read(address: u64) -> BootInfo {
    // SAFETY: it was written there by this very program, in memory that stays as it is.
    unsafe { *(address as *const BootInfo) }
}

fn check(status: Status, what: &'static str) -> Result<(), Refusal> {
    if status.is_error() { Err(Refusal(what, status)) } else { Ok(()) }
}

fn status_name(status: Status) -> &'static str {
    match status {
        Status::NOT_FOUND => "  it is not there",
        Status::OUT_OF_RESOURCES => "  there is not enough memory below 4 GiB",
        Status::DEVICE_ERROR => "  the device failed",
        _ => "  the firmware does not say why",
    }
}

/// Writes a line on the firmware's console.
///
/// # Safety
/// Boot services have not ended.
unsafe fn say(system: &SystemTable, line: &str) {
    let mut wide = [0u16; 100];
    for (place, byte) in wide.iter_mut().zip("bivisor: ".bytes().chain(line.bytes()).chain(*b"\r\n").take(98))
    {
        *place = byte.into();
    }
    // SAFETY: the console is the firmware's, and the text ends with a zero.
    unsafe {
        if let Some(console) = system.stdout.as_mut() {
            // Nothing can be done about a console that fails.
            let _ = (console.output_string)(console, wide.as_ptr());
        }
    }
}

/// # Safety
/// As [`main`].
unsafe fn leave(image: Handle, system: &SystemTable) -> Result<*const BootInfo, Refusal> {
    let mut info = BootInfo::EMPTY;
    // SAFETY: the caller's promise. The information lies in pages that were allocated for it.
    unsafe {
        let services = &*system.boot_services;
        let loaded: *mut LoadedImageProtocol =
            protocol(services, image, &LoadedImageProtocol::GUID, "the image is not known to the firmware")?;
        let loaded = &*loaded;
        if loaded.image_base as u64 + loaded.image_size > MAPPED_END {
            return Err(Refusal("the firmware has loaded the image above 4 GiB", Status::UNSUPPORTED));
        }
        info.add_module(load_machines(services, loaded.device_handle)?);
        info.acpi = find_acpi(system);
        let place = allocate(services, size_of::<BootInfo>() as u64)? as *mut BootInfo;
        exit(services, image, &mut info)?;
        place.write(info);
        Ok(place)
    }
}

/// An interface of a handle's.
///
/// # Safety
/// Boot services have not ended.
unsafe fn protocol<T>(
    services: &BootServices,
    handle: Handle,
    guid: &Guid,
    what: &'static str,
) -> Result<*mut T, Refusal> {
    let mut interface: *mut c_void = ptr::null_mut();
    // SAFETY: the caller's promise.
    check(unsafe { (services.handle_protocol)(handle, guid, &raw mut interface) }, what)?;
    Ok(interface.cast())
}

/// Whole pages below 4 GiB, which the memory map will say are a loader's.
///
/// # Safety
/// Boot services have not ended.
unsafe fn allocate(services: &BootServices, size: u64) -> Result<u64, Refusal> {
    let mut address = MAPPED_END - 1;
    // SAFETY: the caller's promise.
    let status = unsafe {
        let pages = size.div_ceil(PAGE) as usize;
        (services.allocate_pages)(AllocateType::MAX_ADDRESS, MemoryType::LOADER_DATA, pages, &raw mut address)
    };
    check(status, "the machines find no room")?;
    Ok(address)
}

/// Reads the file with the machines.
///
/// # Safety
/// Boot services have not ended.
unsafe fn load_machines(services: &BootServices, device: Handle) -> Result<Range, Refusal> {
    const WHAT: &str = "\\bivisor\\machines can't be read from the partition that bivisor was loaded from";
    let mut name = [0u16; MACHINES.len() + 1];
    name.iter_mut().zip(MACHINES.bytes()).for_each(|(place, byte)| *place = byte.into());
    // SAFETY: the caller's promise; the interfaces are used as UEFI says, and buffers are as long as they are said to be.
    unsafe {
        let system: *mut SimpleFileSystemProtocol =
            protocol(services, device, &SimpleFileSystemProtocol::GUID, WHAT)?;
        let (mut root, mut file): (*mut FileProtocolV1, *mut FileProtocolV1) =
            (ptr::null_mut(), ptr::null_mut());
        check(((*system).open_volume)(system, &raw mut root), WHAT)?;
        let mode = (FileMode::READ, FileAttribute::empty());
        check(((*root).open)(root, &raw mut file, name.as_ptr(), mode.0, mode.1), WHAT)?;
        let mut about = [0u64; 64];
        let mut length = size_of_val(&about);
        check(((*file).get_info)(file, &FileInfo::ID, &raw mut length, about.as_mut_ptr().cast()), WHAT)?;
        let size = (*about.as_ptr().cast::<FileInfo>()).file_size;
        let start = allocate(services, size.max(1))?;
        let mut done = 0;
        while done < size {
            let mut count = (size - done).min(16 << 20) as usize;
            check(((*file).read)(file, &raw mut count, (start + done) as *mut c_void), WHAT)?;
            if count == 0 {
                return Err(Refusal(WHAT, Status::END_OF_FILE));
            }
            done += count as u64;
        }
        // What closing them says changes nothing.
        let _ = ((*file).close)(file);
        let _ = ((*root).close)(root);
        Ok(Range { start, end: start + size })
    }
}

/// # Safety
/// Boot services have not ended.
unsafe fn find_acpi(system: &SystemTable) -> Option<AcpiRoot> {
    // SAFETY: the firmware's table has as many entries as it says.
    let tables = unsafe {
        slice::from_raw_parts(system.configuration_table, system.number_of_configuration_table_entries)
    };
    [ACPI_20, ACPI_10].iter().find_map(|guid| {
        let table = tables.iter().find(|table| table.vendor_guid == *guid)?;
        // SAFETY: the firmware says that the root pointer is there.
        unsafe { AcpiRoot::at(&Identity, table.vendor_table as u64) }
    })
}

/// Ends boot services, and fills in what memory there is then.
///
/// # Safety
/// Boot services have not ended.
unsafe fn exit(services: &BootServices, image: Handle, info: &mut BootInfo) -> Result<(), Refusal> {
    const WHAT: &str = "the firmware does not let go of the machine";
    let (mut size, mut key, mut stride, mut version) = (0, 0, 0, 0);
    // SAFETY: the caller's promise. A map that is asked for with no room only tells its size.
    let room = unsafe {
        let _ = (services.get_memory_map)(
            &raw mut size,
            ptr::null_mut(),
            &raw mut key,
            &raw mut stride,
            &raw mut version,
        );
        size += SPARE_DESCRIPTORS * stride;
        let buffer = allocate(services, size as u64)?;
        slice::from_raw_parts_mut(buffer as *mut u8, size.next_multiple_of(PAGE as usize))
    };
    let mut status = Status::INVALID_PARAMETER;
    // The map may change while boot services end, once.
    for _ in 0..2 {
        size = room.len();
        let buffer = room.as_mut_ptr().cast::<MemoryDescriptor>();
        // SAFETY: the caller's promise; the buffer is as long as it is said to be.
        status = unsafe {
            let got = (services.get_memory_map)(
                &raw mut size,
                buffer,
                &raw mut key,
                &raw mut stride,
                &raw mut version,
            );
            check(got, WHAT)?;
            (services.exit_boot_services)(image, key)
        };
        if !status.is_error() {
            break;
        }
    }
    check(status, WHAT)?;
    read_map(info, &room[..size], stride);
    Ok(())
}

/// Takes note of RAM, from descriptors that are `stride` bytes apart: what the firmware has used until now too.
fn read_map(info: &mut BootInfo, map: &[u8], stride: usize) {
    const USABLE: [MemoryType; 5] = [
        MemoryType::LOADER_CODE,
        MemoryType::LOADER_DATA,
        MemoryType::BOOT_SERVICES_CODE,
        MemoryType::BOOT_SERVICES_DATA,
        MemoryType::CONVENTIONAL,
    ];
    let word = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_le_bytes)
    };
    // Offsets of UEFI Specification, 7.2, EFI_MEMORY_DESCRIPTOR.
    for descriptor in map.chunks_exact(stride.max(size_of::<MemoryDescriptor>())) {
        let kind = MemoryType(word(descriptor, 0) as u32);
        let (start, pages) = (word(descriptor, 8), word(descriptor, 24));
        if USABLE.contains(&kind) {
            info.add_memory(Range { start, end: start.saturating_add(pages.saturating_mul(PAGE)) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn what_the_firmware_has_used_is_free_afterwards() {
        let descriptor = |kind: MemoryType, start: u64, pages: u64| {
            let words = [u64::from(kind.0) | 0xdead_beef << 32, start, 0, pages, 0xf, 0x5555];
            words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>()
        };
        let map = [
            descriptor(MemoryType::BOOT_SERVICES_CODE, 0, 1),
            descriptor(MemoryType::CONVENTIONAL, 0x1000, 0x9f),
            descriptor(MemoryType::RUNTIME_SERVICES_DATA, 0xa_0000, 1),
            descriptor(MemoryType::LOADER_DATA, 0x10_0000, 0x100),
            descriptor(MemoryType::MMIO, 0xfee0_0000, 1),
            descriptor(MemoryType::CONVENTIONAL, 1 << 32, 1 << 18),
        ]
        .concat();
        let mut info = BootInfo::EMPTY;
        read_map(&mut info, &map, 48);
        let range = |start, end| Range { start, end };
        assert_eq!(
            info.memory(),
            [range(0, 0xa_0000), range(0x10_0000, 0x20_0000), range(1 << 32, (1 << 32) + (1 << 30))]
        );
    }
}
