//! The oracle: judges histories of a store's clients and watchers. The simulation and the fault tests with real processes
//! record them; the judgement is the same.

mod check;
mod history;

pub use check::check;
pub use history::{Action, Answer, Change, Committed, Moment, Operation, Seen, Watched};
