//! Pure: records in, desired kernel state out, difference to actual.
