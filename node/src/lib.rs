//! The node agent and the CNI plugin.
