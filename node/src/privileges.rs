//! What the agent may do on this machine, asked before it touches anything.

use anyhow::bail;

/// Capabilities that the agent cannot do without, by their number in `linux/capability.h`: interfaces, routes and
/// programs; maps, and the namespaces of pods.
const NEEDED: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")];

/// Refuses to go on without the capabilities that are needed.
///
/// # Errors
/// Some are missing; the error names them.
pub fn require() -> anyhow::Result<()> {
    // Without /proc the first refused call says it instead.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let missing = missing(&status);
    if !missing.is_empty() {
        bail!(
            "this needs {}: run it as root, or grant them",
            missing.join(" and ")
        );
    }
    Ok(())
}

/// What the effective set in a `/proc/PID/status` (proc(5)) lacks; nothing where it has no such line.
fn missing(status: &str) -> Vec<&'static str> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok())
        .unwrap_or(u64::MAX);
    NEEDED
        .into_iter()
        .filter(|(number, _)| effective & (1 << number) == 0)
        .map(|(_, name)| name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_that_are_missing_are_named() {
        let with = |effective: &str| format!("Name:\tx\nCapEff:\t{effective}\nCapBnd:\t0\n");
        assert_eq!(missing(&with("000001ffffffffff")), Vec::<&str>::new());
        assert_eq!(missing(&with("0000000000001000")), ["CAP_SYS_ADMIN"]);
        assert_eq!(
            missing(&with("0000000000000000")),
            ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"]
        );
    }
}
