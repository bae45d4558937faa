//! Packets through WireGuard devices.

mod opened;
mod traffic;
