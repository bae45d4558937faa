//! What this kernel can do, found by trying; the object's constants follow from it.

use crate::sys::{bpf, probe};

/// The oldest kernel: redirecting into a pod and to a neighbour came with it.
const KERNEL_MIN: (u32, u32) = (5, 10);

/// The first kernel whose VXLAN devices filter identifiers.
const VNI_FILTER_MIN: (u32, u32) = (5, 18);

/// What differs between the kernels on which the programs run (5.10 and later).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// tcx links (6.6).
    pub tcx: bool,
    /// A refused socket call ends with "connection refused" (6.1); else with "operation not permitted".
    pub socket_errors: bool,
    /// Devices take part in segmenting tunnel packets (5.13).
    pub ethernet_inside: bool,
    /// VXLAN devices can be told which identifiers they accept (5.18; by the kernel's version, because older
    /// ones ignore it).
    pub closed_vxlan: bool,
}

impl Features {
    /// Asks the kernel. What it does not answer, for want of rights too, counts as absent.
    #[must_use]
    pub fn probe() -> Self {
        Self {
            tcx: bpf::tcx_supported(),
            socket_errors: probe::socket_errors(),
            ethernet_inside: probe::ethernet_inside(),
            closed_vxlan: kernel().is_some_and(|(version, _)| version >= VNI_FILTER_MIN),
        }
    }

    /// Constants of the object with the kernel programs, by name, as they must be on this kernel.
    #[must_use]
    pub fn constants(self) -> [(&'static str, u8); 2] {
        [
            ("SOCKET_ERRORS", self.socket_errors.into()),
            ("ETHERNET_INSIDE", self.ethernet_inside.into()),
        ]
    }
}

/// The running kernel's release, if it is older than any on which the programs load.
pub(crate) fn too_old() -> Option<String> {
    let (version, release) = kernel()?;
    (version < KERNEL_MIN).then_some(release)
}

/// Version and release of the running kernel.
pub(crate) fn kernel() -> Option<((u32, u32), String)> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let release = release.trim();
    let mut numbers = release.split(['.', '-']).map(str::parse);
    let version = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some((version, release.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found_agrees_with_the_kernels_version() {
        let (version, release) = kernel().unwrap();
        let expected = Features {
            tcx: version >= (6, 6),
            socket_errors: version >= (6, 1),
            ethernet_inside: version >= (5, 13),
            closed_vxlan: version >= (5, 18),
        };
        assert_eq!(Features::probe(), expected, "kernel {release}");
    }
}
