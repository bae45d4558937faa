//! Plans that are too large for one transaction: carried out in steps, each of bounded size and true by itself.

/// A step plans no further write once it has so many. With their guards they stay far below the largest log entry.
pub const MAX_STEP_WRITES: usize = 1_024;
/// Nor once it has so many conditions: a step may judge much and change little.
pub(crate) const MAX_STEP_GUARDS: usize = 4 * MAX_STEP_WRITES;

/// What a step promises once it is committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<T, P> {
    /// Everything is done.
    Done(T),
    /// The plan goes on from here, on the state that this step leaves.
    More(P),
}
