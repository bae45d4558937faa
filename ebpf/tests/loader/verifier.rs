//! What loading costs: the kernel's verifier walks every path of every program whenever an agent starts.

use std::collections::BTreeMap;

use aya::programs::loaded_programs;
use clustermesh_ebpf::Datapath;

use crate::node::in_node;

/// Most instructions that the verifier may walk for one program. Its own limit is a million (Linux 5.2 and later);
/// older kernels prune less, and each hundred thousand is a fifth of a second of every start.
const WALKED_MAX: u32 = 100_000;

#[test]
fn every_program_is_verified_in_few_steps() {
    in_node(|node| {
        let before = loaded_programs().flatten().map(|program| program.id());
        let last = before.max().unwrap_or(0);
        let _datapath: Datapath = node.active();
        let walked: BTreeMap<String, u32> = loaded_programs()
            .flatten()
            .filter(|program| program.id() > last)
            .filter_map(|program| {
                let name = program.name_as_str()?.to_owned();
                Some((name, program.verified_instruction_count()?))
            })
            .collect();
        // Of the fourteen, both getpeername programs have the same 15 letters.
        assert_eq!(walked.len(), 13, "{walked:?}");
        for (name, count) in &walked {
            assert!(*count <= WALKED_MAX, "{name}: {count}");
        }
    });
}
