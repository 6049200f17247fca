//! Networks without a virtual machine: smoltcp's interface is the guest behind the packet port.

mod guest;
mod user;
