//! Pure mesh decisions: allocation, claims, service join, peer copies.
