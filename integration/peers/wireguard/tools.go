//go:build tools

// Package wireguard pins wireguard-go, apart from etcd: neither must choose the other's dependencies.
package wireguard

import _ "golang.zx2c4.com/wireguard"
