//! Kernel settings of the calling thread's network namespace.

use std::fs;

use super::NetlinkError;

/// Writes a setting if it has another value; `name` with slashes, below `/proc/sys`.
///
/// # Errors
/// There is no such setting, or it cannot be written.
pub fn write(name: &str, value: &str) -> Result<(), NetlinkError> {
    // `self` would be the main thread's namespace.
    let path = format!("/proc/sys/{name}");
    let action = || format!("set {name} to {value}");
    let before = fs::read_to_string(&path).map_err(|e| NetlinkError::other(action(), e))?;
    if before.trim() == value {
        return Ok(());
    }
    fs::write(&path, value).map_err(|e| NetlinkError::other(action(), e))
}
