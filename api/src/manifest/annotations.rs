//! The reserved annotations of a Service: Cilium's, with their older names.

use std::{collections::BTreeMap, fmt};

/// `"true"`: services of the same namespace and name in other clusters merge.
pub const GLOBAL_ANNOTATION: &str = "service.cilium.io/global";
/// `"false"`: use the backends of other clusters, offer none.
pub const SHARED_ANNOTATION: &str = "service.cilium.io/shared";
/// `local`, `remote` or `none`: which backends are preferred.
pub const AFFINITY_ANNOTATION: &str = "service.cilium.io/affinity";

const OLD_GLOBAL: &str = "io.cilium/global-service";
const OLD_SHARED: &str = "io.cilium/shared-service";
const OLD_AFFINITY: &str = "io.cilium/service-affinity";

/// Which backends of a global service are preferred.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Affinity {
    /// All alike.
    #[default]
    None,
    /// Those of this cluster, others only when none of them is usable.
    Local,
    /// Those of other clusters, this one's only when none of them is usable.
    Remote,
}

impl fmt::Display for Affinity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Local => "local",
            Self::Remote => "remote",
        })
    }
}

/// An annotation that says nothing we know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("annotation {name} is {value:?}, expected {expected}")]
pub struct AnnotationError {
    /// The annotation.
    pub name: String,
    /// Its value.
    pub value: String,
    /// What it may be.
    pub expected: &'static str,
}

/// What the annotations of a Service say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceAnnotations {
    /// Merge with other clusters.
    pub global: bool,
    /// Offer our backends to other clusters; only ever true of a global service.
    pub shared: bool,
    /// Preferred backends.
    pub affinity: Affinity,
}

impl ServiceAnnotations {
    /// Reads them as Cilium does: what is not understood counts as absent.
    #[must_use]
    pub fn read(annotations: &BTreeMap<String, String>) -> Self {
        let global = find(annotations, GLOBAL_ANNOTATION, OLD_GLOBAL)
            .is_some_and(|(_, value)| is(value, "true"));
        let unshared = find(annotations, SHARED_ANNOTATION, OLD_SHARED)
            .is_some_and(|(_, value)| is(value, "false"));
        let affinity = match find(annotations, AFFINITY_ANNOTATION, OLD_AFFINITY) {
            Some((_, value)) if is(value, "local") => Affinity::Local,
            Some((_, value)) if is(value, "remote") => Affinity::Remote,
            _ => Affinity::None,
        };
        Self {
            global,
            shared: global && !unshared,
            affinity,
        }
    }

    /// Refuses what [`Self::read`] would ignore: an operator is told of a typing mistake.
    ///
    /// # Errors
    /// The first annotation with an unknown value.
    pub fn check(annotations: &BTreeMap<String, String>) -> Result<(), AnnotationError> {
        for (name, old, allowed, expected) in [
            (
                GLOBAL_ANNOTATION,
                OLD_GLOBAL,
                &["true", "false"][..],
                "\"true\" or \"false\"",
            ),
            (
                SHARED_ANNOTATION,
                OLD_SHARED,
                &["true", "false"][..],
                "\"true\" or \"false\"",
            ),
            (
                AFFINITY_ANNOTATION,
                OLD_AFFINITY,
                &["local", "remote", "none"][..],
                "\"local\", \"remote\" or \"none\"",
            ),
        ] {
            if let Some((name, value)) = find(annotations, name, old)
                && !allowed.iter().any(|word| is(value, word))
            {
                return Err(AnnotationError {
                    name: name.to_owned(),
                    value: value.to_owned(),
                    expected,
                });
            }
        }
        Ok(())
    }
}

fn is(value: &str, word: &str) -> bool {
    value.eq_ignore_ascii_case(word)
}

fn find<'a>(
    annotations: &'a BTreeMap<String, String>,
    name: &'a str,
    old: &'a str,
) -> Option<(&'a str, &'a str)> {
    [name, old]
        .into_iter()
        .find_map(|name| annotations.get(name).map(|value| (name, value.as_str())))
}
