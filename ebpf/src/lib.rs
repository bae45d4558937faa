//! Loads and attaches the kernel programs; typed maps; pinned state.
