//! The server process: gRPC services, sessions, peering, controllers.
