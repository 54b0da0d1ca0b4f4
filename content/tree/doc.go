// Package tree encodes the entries of one layer, and merges the layers of a chain.
//
// It does no deduplication and touches no objects: values in, values out, but
// for reading tree files.
package tree
