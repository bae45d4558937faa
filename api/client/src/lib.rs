//! Client of clustermesh-server: mTLS channel, etcd calls, agent stream, node session.
