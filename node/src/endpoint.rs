//! Local endpoints: their life from CNI ADD to DEL, over restarts, and what the kernel maps say of them.

mod pod;
mod registry;

pub use pod::{PodPlan, interface_name};
pub use registry::{AddRequest, EndpointError, Endpoints};
