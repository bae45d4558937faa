//! What the roles of one user add up to: disjoint key ranges, as etcd's unified range permissions.

use bytes::Bytes;
use clustermesh_api::etcd::auth;

/// What is done to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Keys or values are read.
    Read,
    /// Keys are put or deleted.
    Write,
}

/// Ranges that may be read and those that may be written, each sorted and with no two that touch.
#[derive(Clone, Debug, Default)]
pub(super) struct Permissions {
    readable: Vec<Span>,
    writable: Vec<Span>,
}

/// Keys from `start` up to, without, `end`; `None` is beyond all keys.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Span {
    start: Bytes,
    end: Option<Bytes>,
}

impl Span {
    fn new(permission: &auth::Permission) -> Self {
        let start = permission.key.clone();
        let end = match permission.range_end.as_ref() {
            [] => Some([start.as_ref(), &[0]].concat().into()),
            [0] => None,
            _ => Some(permission.range_end.clone()),
        };
        Self { start, end }
    }

    fn reaches(&self, key: &[u8]) -> bool {
        self.end.as_ref().is_none_or(|end| key <= end.as_ref())
    }
}

impl Permissions {
    pub(super) fn new<'a>(granted: impl Iterator<Item = &'a auth::Permission>) -> Self {
        use auth::permission::Type;
        let mut all = Self::default();
        for permission in granted {
            let span = Span::new(permission);
            match Type::try_from(permission.perm_type) {
                Ok(Type::Read) => all.readable.push(span),
                Ok(Type::Write) => all.writable.push(span),
                Ok(Type::Readwrite) => {
                    all.readable.push(span.clone());
                    all.writable.push(span);
                }
                // etcd stores a type that it does not know and grants nothing by it.
                Err(_) => {}
            }
        }
        merge(&mut all.readable);
        merge(&mut all.writable);
        all
    }

    /// Whether every key of the range is granted.
    pub(super) fn cover(&self, key: &[u8], range_end: &[u8], access: Access) -> bool {
        let spans = match access {
            Access::Read => &self.readable,
            Access::Write => &self.writable,
        };
        let after = spans.partition_point(|span| span.start.as_ref() <= key);
        let Some(span) = after.checked_sub(1).and_then(|place| spans.get(place)) else {
            return false;
        };
        let holds_key = span.end.as_ref().is_none_or(|end| key < end.as_ref());
        holds_key
            && match range_end {
                [0] => span.end.is_none(),
                // A range that holds nothing is as good as its first key.
                _ => range_end <= key || span.reaches(range_end),
            }
    }
}

fn merge(spans: &mut Vec<Span>) {
    spans.sort_by(|a, b| a.start.cmp(&b.start));
    let mut merged: Vec<Span> = Vec::with_capacity(spans.len());
    for span in spans.drain(..) {
        match merged.last_mut() {
            Some(last) if last.reaches(&span.start) => {
                let longer = match (&last.end, &span.end) {
                    (None, _) => false,
                    (Some(_), None) => true,
                    (Some(end), Some(other)) => other > end,
                };
                if longer {
                    last.end = span.end;
                }
            }
            _ => merged.push(span),
        }
    }
    *spans = merged;
}
