//! Pure: everything of a WireGuard device that needs no socket, clock or random source.
//!
//! Time comes in as [`core::time::Duration`] since some start, randomness as bytes; packets go out as bytes. The protocol
//! is that of "WireGuard: Next Generation Kernel Network Tunnel" (J. A. Donenfeld, NDSS 2017), here "the paper".

pub mod allowed_ips;
pub mod checksum;
pub mod config;
pub mod control;
pub mod control_client;
pub mod difference;
pub mod engine;
pub mod key;
pub mod mac;
pub mod merge;
pub mod message;
pub mod noise;
pub mod packet;
pub mod replay;
pub mod secret_text;
pub mod session;
pub mod split;
#[cfg(any(test, feature = "test-support"))]
pub mod test_support;
pub mod vnet;

#[cfg(test)]
mod offload_tests;
