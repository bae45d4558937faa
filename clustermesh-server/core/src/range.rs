//! Range: filters, order, limit and counts of etcd's `RangeRequest`.

use clustermesh_api::etcd::rpc::{
    RangeRequest, RangeResponse,
    range_request::{SortOrder, SortTarget},
};

use crate::{error::KvError, key_range::KeyRange, keyspace::Keyspace, version::Version};

/// What a reader sees: the keyspace at a revision, perhaps in the middle of a transaction.
#[derive(Clone, Copy)]
pub(crate) struct ReadView<'a> {
    pub(crate) keyspace: &'a Keyspace,
    /// Newest revision that may be read.
    pub(crate) revision: i64,
    pub(crate) compact_revision: i64,
}

impl ReadView<'_> {
    /// Answers a range request; the header is left to the caller.
    pub(crate) fn range(&self, request: &RangeRequest) -> Result<RangeResponse, KvError> {
        self.answer(request, true)
    }

    /// [`ReadView::range`] without the count where it would cost a walk over the rest of the range.
    pub(crate) fn range_page(&self, request: &RangeRequest) -> Result<RangeResponse, KvError> {
        self.answer(request, false)
    }

    fn answer(&self, request: &RangeRequest, counted: bool) -> Result<RangeResponse, KvError> {
        if request.revision > self.revision {
            return Err(KvError::FutureRevision);
        }
        let revision = if request.revision <= 0 {
            self.revision
        } else {
            request.revision
        };
        if revision < self.compact_revision {
            return Err(KvError::Compacted);
        }
        let range = KeyRange::new(&request.key, &request.range_end);
        let mut found = self.keyspace.visible(&range, revision);
        // What lives now is counted by the index; an older revision costs a walk.
        let is_newest = revision >= self.revision;
        if request.count_only {
            let count = if is_newest {
                self.keyspace.count_live(&range)
            } else {
                found.count()
            };
            return Ok(RangeResponse {
                count: length(count),
                ..RangeResponse::default()
            });
        }
        let limit = usize::try_from(request.limit)
            .ok()
            .filter(|limit| *limit > 0)
            .unwrap_or(usize::MAX);
        let fetch = if must_see_all(request) {
            usize::MAX
        } else {
            limit.saturating_add(1)
        };
        let mut versions: Vec<&Version> = found.by_ref().take(fetch).collect();
        // The count is that of the whole range: limit and filters do not change it.
        let count = if counted && is_newest && versions.len() == fetch {
            length(self.keyspace.count_live(&range))
        } else if counted {
            length(versions.len() + found.count())
        } else {
            0
        };
        versions.retain(|version| passes(request, version));
        sort(request, &mut versions);
        let more = versions.len() > limit;
        versions.truncate(limit);
        let kvs = versions
            .into_iter()
            .map(|version| {
                let mut kv = version.to_key_value();
                if request.keys_only {
                    kv.value.clear();
                    // etcd answers from its index, which knows no leases, unless it has to sort by value.
                    if request.sort_target != SortTarget::Value as i32 {
                        kv.lease = 0;
                    }
                }
                kv
            })
            .collect();
        Ok(RangeResponse {
            header: None,
            kvs,
            more,
            count,
        })
    }
}

fn length(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// The limit applies after sorting and filtering. A target without an order is sorted after the limit, as etcd does.
fn must_see_all(request: &RangeRequest) -> bool {
    let default_order = request.sort_order == SortOrder::None as i32
        || (request.sort_target == SortTarget::Key as i32
            && request.sort_order == SortOrder::Ascend as i32);
    !default_order
        || request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0
}

fn passes(request: &RangeRequest, version: &Version) -> bool {
    let within =
        |value: i64, min: i64, max: i64| (max == 0 || value <= max) && (min == 0 || value >= min);
    within(
        version.mod_revision(),
        request.min_mod_revision,
        request.max_mod_revision,
    ) && within(
        version.create_revision(),
        request.min_create_revision,
        request.max_create_revision,
    )
}

fn sort(request: &RangeRequest, versions: &mut [&Version]) {
    let target = request.sort_target();
    let descending = request.sort_order() == SortOrder::Descend;
    match target {
        // The index is in key order already.
        SortTarget::Key => {
            if descending {
                versions.reverse();
            }
        }
        SortTarget::Version => sort_by(versions, descending, Version::version),
        SortTarget::Create => sort_by(versions, descending, Version::create_revision),
        SortTarget::Mod => sort_by(versions, descending, Version::mod_revision),
        SortTarget::Value => {
            versions.sort_by(|a, b| {
                let order = a.value_bytes().cmp(b.value_bytes());
                if descending { order.reverse() } else { order }
            });
        }
    }
}

fn sort_by(versions: &mut [&Version], descending: bool, number: impl Fn(&Version) -> i64) {
    versions.sort_by(|a, b| {
        let order = number(a).cmp(&number(b));
        if descending { order.reverse() } else { order }
    });
}

#[cfg(test)]
mod tests;
