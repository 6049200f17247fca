//! Networks without a virtual machine: smoltcp's interface is the guest behind the packet port.

#[path = "../fuzz/budget.rs"]
mod budget;
mod bulk;
mod guest;
mod hostile;
mod ipv6;
mod switch;
mod tap;
mod user;
