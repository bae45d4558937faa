//! Pod CIDRs of nodes: one block of each family from the cluster's ranges.

use clustermesh_api::records::Node;
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::{AllocateError, Plan, join, keys, plan, read_json, write_json};
use crate::address::{
    FAMILIES, Family, bounds, canonical, covers, family_bits, from_number, overlaps,
};
use crate::draft::Draft;
use crate::settings::ClusterSettings;
use crate::view::View;

/// Pod CIDRs of one node, at most one of each family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodePodCidrs {
    /// IPv4 block.
    pub v4: Option<IpNetwork>,
    /// IPv6 block.
    pub v6: Option<IpNetwork>,
}

impl NodePodCidrs {
    /// Block of one family.
    #[must_use]
    pub fn of(&self, family: Family) -> Option<IpNetwork> {
        match family {
            Family::IPv4 => self.v4,
            Family::IPv6 => self.v6,
        }
    }

    /// All blocks, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpNetwork> {
        [self.v4, self.v6].into_iter().flatten()
    }

    fn slot(&mut self, family: Family) -> &mut Option<IpNetwork> {
        match family {
            Family::IPv4 => &mut self.v4,
            Family::IPv6 => &mut self.v6,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Block {
    node: String,
}

/// All blocks given out, with their nodes.
fn blocks(view: &dyn View) -> Result<Vec<(IpNetwork, String)>, AllocateError> {
    view.list(keys::POD_CIDRS.as_bytes())
        .into_iter()
        .map(|kv| {
            let text = String::from_utf8_lossy(&kv.key[keys::POD_CIDRS.len()..]).into_owned();
            let cidr = text
                .parse::<IpNetwork>()
                .map_err(|error| AllocateError::Damaged {
                    key: String::from_utf8_lossy(&kv.key).into_owned(),
                    reason: error.to_string(),
                })?;
            Ok((cidr, read_json::<Block>(&kv.key, &kv.value)?.node))
        })
        .collect()
}

/// Blocks that the node has now.
///
/// # Errors
/// Bookkeeping is damaged.
pub fn pod_cidrs(view: &dyn View, node: &str) -> Result<NodePodCidrs, AllocateError> {
    let mut own = NodePodCidrs::default();
    for (cidr, _) in blocks(view)?
        .into_iter()
        .filter(|(_, holder)| holder == node)
    {
        *own.slot(Family::of(cidr.ip())) = Some(cidr);
    }
    Ok(own)
}

/// Gives the node one block of each family that the cluster has: the one it has already, else one that it
/// held before (`held`) if that is free, else the first free one.
///
/// # Errors
/// No block is free, or the cluster has no pod CIDR.
pub fn assign_pod_cidrs(
    draft: &mut Draft<'_>,
    settings: &ClusterSettings,
    node: &str,
    held: &[IpNetwork],
) -> Result<NodePodCidrs, AllocateError> {
    if settings.pod_cidrs.is_empty() {
        return Err(AllocateError::NoPodCidr(settings.name.clone()));
    }
    if let Some(own) = recorded(draft, settings, node) {
        for cidr in own.iter() {
            draft.guard(keys::pod_cidr(cidr));
        }
        return Ok(own);
    }
    let given = blocks(draft)?;
    let mut own = NodePodCidrs::default();
    for family in FAMILIES {
        if settings.pod_cidrs(family).next().is_some() {
            *own.slot(family) = Some(block(draft, settings, node, held, &given, family)?);
        }
    }
    Ok(own)
}

/// The blocks that the node's record names, if it has them and they are all that it is due: many agents may come back
/// at once, and need not read every block.
fn recorded(view: &dyn View, settings: &ClusterSettings, node: &str) -> Option<NodePodCidrs> {
    let kv = view.get(&crate::keys::node(&settings.name, node))?;
    let record = Node::decode(&kv.value).ok()?;
    let mut own = NodePodCidrs::default();
    for family in FAMILIES {
        if settings.pod_cidrs(family).next().is_none() {
            continue;
        }
        let held = record
            .pod_cidrs()
            .map(|cidr| canonical(cidr.0))
            .find(|cidr| {
                let inside = settings.pod_cidrs(family).any(|range| covers(range, *cidr));
                let key = keys::pod_cidr(*cidr);
                inside
                    && view
                        .get(&key)
                        .and_then(|kv| read_json::<Block>(&key, &kv.value).ok())
                        .is_some_and(|block| block.node == node)
            })?;
        *own.slot(family) = Some(held);
    }
    Some(own)
}

/// [`assign_pod_cidrs`] as a plan of its own.
///
/// # Errors
/// As [`assign_pod_cidrs`].
pub fn plan_pod_cidrs(
    view: &dyn View,
    settings: &ClusterSettings,
    node: &str,
    held: &[IpNetwork],
) -> Result<Plan<NodePodCidrs>, AllocateError> {
    plan(view, |draft| assign_pod_cidrs(draft, settings, node, held))
}

fn block(
    draft: &mut Draft<'_>,
    settings: &ClusterSettings,
    node: &str,
    held: &[IpNetwork],
    given: &[(IpNetwork, String)],
    family: Family,
) -> Result<IpNetwork, AllocateError> {
    let inside = |cidr: IpNetwork| settings.pod_cidrs(family).any(|range| covers(range, cidr));
    let own = given
        .iter()
        .find(|(cidr, holder)| holder == node && inside(*cidr));
    if let Some((cidr, _)) = own {
        draft.guard(keys::pod_cidr(*cidr));
        return Ok(*cidr);
    }
    let mask = settings.node_mask(family);
    let free = |cidr: IpNetwork| !given.iter().any(|(taken, _)| overlaps(*taken, cidr));
    let cidr = held
        .iter()
        .map(|cidr| canonical(*cidr))
        .find(|cidr| cidr.prefix() == mask && inside(*cidr) && free(*cidr))
        .or_else(|| first_free(settings, family, given))
        .ok_or_else(|| AllocateError::PodCidrsExhausted {
            node: node.to_owned(),
            mask,
            cidrs: join(settings.pod_cidrs(family)),
        })?;
    // Blocks of another size could overlap without having the same key, so no other block may appear meanwhile.
    draft.guard_prefix(keys::POD_CIDRS);
    let key = keys::pod_cidr(cidr);
    draft.guard(key.clone());
    // A block outside the cluster's ranges is left from older settings: the node gets another one for it.
    for (old, _) in given
        .iter()
        .filter(|(old, holder)| holder == node && Family::of(old.ip()) == family)
    {
        draft.delete(keys::pod_cidr(*old));
    }
    draft.put(
        key,
        write_json(&Block {
            node: node.to_owned(),
        }),
    );
    Ok(cidr)
}

/// The lowest free block, ranges in the order of the settings.
fn first_free(
    settings: &ClusterSettings,
    family: Family,
    given: &[(IpNetwork, String)],
) -> Option<IpNetwork> {
    let mask = settings.node_mask(family);
    let size = 1_u128.checked_shl(u32::from(family_bits(family) - mask))?;
    let mut taken: Vec<_> = given
        .iter()
        .filter(|(cidr, _)| Family::of(cidr.ip()) == family)
        .map(|(cidr, _)| bounds(*cidr))
        .collect();
    taken.sort_unstable();
    settings.pod_cidrs(family).find_map(|range| {
        let (first, last) = bounds(range);
        let mut candidate = first;
        for &(taken_first, taken_last) in &taken {
            if taken_last < candidate {
                continue;
            }
            if taken_first > candidate.checked_add(size - 1)? {
                break;
            }
            // Next block boundary after the one taken; blocks are aligned to their size.
            candidate = (taken_last / size).checked_add(1)?.checked_mul(size)?;
        }
        (candidate.checked_add(size - 1)? <= last)
            .then(|| from_number(family, candidate))
            .flatten()
            .and_then(|address| IpNetwork::new(address, mask).ok())
    })
}

/// Gives back all blocks of a node that is removed.
///
/// # Errors
/// Bookkeeping is damaged.
pub fn release_pod_cidrs(draft: &mut Draft<'_>, node: &str) -> Result<NodePodCidrs, AllocateError> {
    let own = pod_cidrs(draft, node)?;
    for cidr in own.iter() {
        draft.guard(keys::pod_cidr(cidr));
        draft.delete(keys::pod_cidr(cidr));
    }
    Ok(own)
}
