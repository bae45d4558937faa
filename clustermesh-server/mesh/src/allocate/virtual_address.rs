//! Virtual addresses of Services: durable, and not given to another Service for a while.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{AllocateError, join, keys, read_json, write_json};
use crate::address::{FAMILIES, Family, from_number, number};
use crate::draft::Draft;
use crate::settings::ClusterSettings;
use crate::view::View;

/// A freed address is not given to another Service for this long, ms: clients and DNS caches may still use it.
pub const VIRTUAL_ADDRESS_QUARANTINE_MS: i64 = 3_600_000;
/// Addresses tried before a range counts as exhausted.
const MAX_PROBES: usize = 65_536;

/// Who has, or last had, an address.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Holder {
    /// `<namespace>/<name>`.
    service: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    freed_at_unix_ms: Option<i64>,
}

/// What a Service asks for.
#[derive(Clone, Copy, Debug)]
pub struct VirtualAddressRequest<'a> {
    /// `<namespace>/<name>`.
    pub service: &'a str,
    /// Families in the order wanted; empty: every family that the cluster has.
    pub families: &'a [Family],
    /// Addresses that the Service has already, which it keeps.
    pub current: &'a [IpAddr],
}

/// Gives a Service one address of each family, within a larger plan; frees those that it had and no longer needs.
///
/// # Errors
/// A family has no range or no free address.
pub fn virtual_addresses(
    draft: &mut Draft<'_>,
    settings: &ClusterSettings,
    request: VirtualAddressRequest<'_>,
    now_unix_ms: i64,
) -> Result<Vec<IpAddr>, AllocateError> {
    let families: Vec<_> = if request.families.is_empty() {
        FAMILIES
            .into_iter()
            .filter(|family| settings.service_cidrs(*family).next().is_some())
            .collect()
    } else {
        request.families.to_vec()
    };
    let mut addresses = Vec::with_capacity(families.len());
    for &family in &families {
        addresses.push(address(draft, settings, request, family, now_unix_ms)?);
    }
    let dropped: Vec<_> = request
        .current
        .iter()
        .copied()
        .filter(|address| !addresses.contains(address))
        .collect();
    release_virtual_addresses(draft, request.service, &dropped, now_unix_ms)?;
    Ok(addresses)
}

fn address(
    draft: &mut Draft<'_>,
    settings: &ClusterSettings,
    request: VirtualAddressRequest<'_>,
    family: Family,
    now_unix_ms: i64,
) -> Result<IpAddr, AllocateError> {
    let of_family = |list: &[IpAddr]| {
        list.iter()
            .copied()
            .find(|address| Family::of(*address) == family)
    };
    let inside = |address: IpAddr| {
        settings
            .service_cidrs(family)
            .any(|range| range.contains(address))
    };
    if settings.service_cidrs(family).next().is_none() {
        return Err(AllocateError::NoServiceCidr {
            service: request.service.to_owned(),
            family: family.name(),
        });
    }
    let chosen = if let Some(current) = of_family(request.current)
        && inside(current)
        && holder_against(draft, current, request.service, now_unix_ms)?.is_none()
    {
        current
    } else {
        free_address(draft, settings, request.service, family, now_unix_ms)?
    };
    let key = keys::virtual_address(chosen);
    draft.guard(key.clone());
    draft.put(
        key,
        write_json(&Holder {
            service: request.service.to_owned(),
            freed_at_unix_ms: None,
        }),
    );
    Ok(chosen)
}

/// The Service for whose sake `service` cannot have the address; `None` when it can.
fn holder_against(
    draft: &Draft<'_>,
    address: IpAddr,
    service: &str,
    now_unix_ms: i64,
) -> Result<Option<String>, AllocateError> {
    let Some(kv) = draft.get(&keys::virtual_address(address)) else {
        return Ok(None);
    };
    let holder: Holder = read_json(&kv.key, &kv.value)?;
    let reusable = holder
        .freed_at_unix_ms
        .is_some_and(|freed| now_unix_ms.saturating_sub(freed) >= VIRTUAL_ADDRESS_QUARANTINE_MS);
    Ok((holder.service != service && !reusable).then_some(holder.service))
}

/// Addresses are tried in a circle from the last one given out, so that the search is short and reuse is late.
fn free_address(
    draft: &mut Draft<'_>,
    settings: &ClusterSettings,
    service: &str,
    family: Family,
    now_unix_ms: i64,
) -> Result<IpAddr, AllocateError> {
    let ranges: Vec<_> = settings
        .service_cidrs(family)
        .filter_map(ClusterSettings::usable)
        .collect();
    let cursor_key = keys::virtual_address_cursor(family);
    let cursor = draft
        .get(&cursor_key)
        .and_then(|kv| std::str::from_utf8(&kv.value).ok()?.parse::<IpAddr>().ok())
        .filter(|address| Family::of(*address) == family)
        .map(number);
    let start = cursor.and_then(|at| {
        let range = ranges
            .iter()
            .position(|(first, last)| (*first..=*last).contains(&at))?;
        Some((range, at))
    });
    // After the cursor to the end of its range, the other ranges, then its range again up to the cursor.
    let mut order: Vec<(u128, u128)> = Vec::with_capacity(ranges.len() + 1);
    match start {
        Some((range, at)) => {
            let (head, tail) = ranges.split_at(range);
            order.extend(
                tail.iter()
                    .enumerate()
                    .map(|(i, (first, last))| (if i == 0 { at + 1 } else { *first }, *last)),
            );
            order.extend(head);
            order.extend(tail.first().map(|(first, _)| (*first, at)));
        }
        None => order.extend(&ranges),
    }
    let candidates = order
        .into_iter()
        .flat_map(|(first, last)| first..=last)
        .take(MAX_PROBES);
    for candidate in candidates {
        let Some(address) = from_number(family, candidate) else {
            continue;
        };
        if holder_against(draft, address, service, now_unix_ms)?.is_none() {
            draft.put(cursor_key, address.to_string());
            return Ok(address);
        }
    }
    Err(AllocateError::VirtualAddressesExhausted {
        service: service.to_owned(),
        family: family.name(),
        cidrs: join(settings.service_cidrs(family)),
    })
}

/// Frees addresses of a Service; nobody else gets them during the quarantine.
///
/// # Errors
/// Bookkeeping is damaged.
pub fn release_virtual_addresses(
    draft: &mut Draft<'_>,
    service: &str,
    addresses: &[IpAddr],
    now_unix_ms: i64,
) -> Result<(), AllocateError> {
    for &address in addresses {
        let key = keys::virtual_address(address);
        let Some(kv) = draft.get(&key) else { continue };
        let mut holder: Holder = read_json(&kv.key, &kv.value)?;
        if holder.service == service && holder.freed_at_unix_ms.is_none() {
            holder.freed_at_unix_ms = Some(now_unix_ms);
            draft.guard(key.clone());
            draft.put(key, write_json(&holder));
        }
    }
    Ok(())
}
