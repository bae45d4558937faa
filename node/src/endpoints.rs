//! Local endpoints: their life from CNI ADD to DEL, over restarts, and what the kernel maps say of them.

mod del_queue;
mod pod;
mod registry;

pub use del_queue::{DelQueue, file_of as queued_del_file, run as work_off_queue};
pub use pod::{PodPlan, interface_name};
pub use registry::{AddRequest, EndpointError, Endpoints};
