//! Linux backends of the devices.
