//! The server process: etcd v3 and mesh services on one port, sessions, peering, controllers.

pub mod agents;
pub mod answers;
pub mod auth;
pub mod certificates;
pub mod check_data;
pub mod config;
pub mod controllers;
pub mod etcd;
pub mod gateway;
pub mod mesh_api;
pub mod metrics;
pub mod news;
pub mod openings;
pub mod pages;
pub mod peering;
pub mod places;
pub mod planner;
pub mod ports;
pub mod replication;
pub mod serve;
pub mod server;
mod status;
pub mod store;
pub mod tcp;
pub mod version;
pub mod view;
mod wire;
