//! What every process needs: logging, TLS material, readiness, drain, HTTP for metrics and health.
