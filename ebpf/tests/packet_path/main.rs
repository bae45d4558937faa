//! Tests of the programs on packets: one by one, and with real traffic between namespaces. They need root.

mod host;
mod kernel_vxlan;
mod odd_frames;
mod packets;
mod support;
mod tunnel;
