//! Which types may be copied to and from the kernel byte by byte.
#![expect(
    unsafe_code,
    reason = "the one place where values and bytes are exchanged"
)]

use clustermesh_ebpf_abi::{
    Address, BackendKey, BackendValue, EndpointValue, FlowRecord, FrontendKey, FrontendValue,
    InterfaceValue, IpcacheKey, IpcacheValue, MeshKey, MeshValue, NodeAddressValue, NodeConfig,
    NodeValue, SocketChoice, TrafficValue,
};

/// Plain data: what a map key or value of ours may be.
///
/// # Safety
///
/// `#[repr(C)]` or an integer or byte array, without padding, and every bit pattern is a value.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

macro_rules! plain {
    ($($ty:ty),+ $(,)?) => {
        // SAFETY: integers, byte arrays, and `repr(C)` structs of those; clustermesh-ebpf-abi asserts
        // their sizes, which leave no room for padding.
        $(unsafe impl Plain for $ty {})+
    };
}

plain!(
    u32,
    u64,
    Address,
    BackendKey,
    BackendValue,
    EndpointValue,
    FlowRecord,
    FrontendKey,
    FrontendValue,
    InterfaceValue,
    IpcacheKey,
    IpcacheValue,
    MeshKey,
    MeshValue,
    NodeAddressValue,
    NodeConfig,
    NodeValue,
    SocketChoice,
    TrafficValue,
);

/// The value of all-zero bytes.
pub(crate) fn zeroed<T: Plain>() -> T {
    // SAFETY: every bit pattern is a value of a `Plain` type.
    unsafe { std::mem::zeroed() }
}

/// The value in `bytes`; `None` if their number is not the type's size.
pub(crate) fn from_bytes<T: Plain>(bytes: &[u8]) -> Option<T> {
    if bytes.len() != size_of::<T>() {
        return None;
    }
    // SAFETY: the length is right, the read is unaligned, every bit pattern is a value.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// True if all bytes of `value` are zero.
pub(crate) fn is_zero<T: Plain>(value: &T) -> bool {
    // SAFETY: a `Plain` type has no padding, so all its bytes are initialised.
    let bytes = unsafe {
        std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>())
    };
    bytes.iter().all(|byte| *byte == 0)
}
