//! Loads and attaches the kernel programs; typed maps; pinned state.
//!
//! Maps and links are pinned in a BPF file system, so that traffic goes on whatever becomes of the
//! process: nothing here detaches on drop. A new process [opens](Datapath::open) the same maps, and
//! [`Datapath::activate`] switches every link to its programs in place. When the layout of the maps
//! changed, new maps are made beside the old ones; the old programs keep running on theirs until then.

mod datapath;
mod error;
mod features;
mod flows;
mod layout;
mod links;
mod maps;
mod pins;
mod programs;
mod sys;
mod table;

pub use clustermesh_ebpf_abi as abi;
pub use datapath::{Datapath, Options, Takeover};
pub use error::Error;
pub use features::Features;
pub use flows::FlowReader;
pub use links::AttachMode;
pub use maps::Maps;
pub use sys::plain::Plain;
pub use table::{ArrayTable, Table};
