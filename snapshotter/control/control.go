// Package control serves the control API (proto/dedup/v1/control.proto): what an operator
// asks the running daemon. Check, GC, Trim and MakeBlob aside, it changes nothing. Who may connect is the socket's
// mode: root alone. No answer holds the content of an image's files.
package control

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
)

// Options are what the daemon was started with.
type Options struct {
	Version  string
	Root     string
	Fidelity string
	Reuse    string
	// RunDir and ContainerdAddress are the keys of the same names.
	RunDir            string
	ContainerdAddress string
	// Catalog lists the images of the containerd that calls.
	Catalog *blobs.Catalog
	// Blobs is the key of that name, Trimmer what lets go of them, Found where they are.
	Blobs   string
	Trimmer *blobs.Trimmer
	Found   *blobs.Store
}

// Server is a dedupv1.ControlServer.
type Server struct {
	dedupv1.UnimplementedControlServer

	opts Options
	sn   *snapshotter.Snapshotter
}

// New serves what sn holds, until sn is closed.
func New(sn *snapshotter.Snapshotter, opts Options) *Server {
	return &Server{opts: opts, sn: sn}
}

// Status is one look at the daemon and its store.
func (s *Server) Status(ctx context.Context, req *dedupv1.StatusRequest) (*dedupv1.StatusResponse, error) {
	resp := &dedupv1.StatusResponse{
		Version: s.opts.Version, Root: s.opts.Root, Fidelity: s.opts.Fidelity, Reuse: s.opts.Reuse,
		Objects: int64(s.sn.Layers().Objects()), Verity: s.sn.VerityState(), Blobs: s.opts.Blobs,
	}
	addTotals(resp, s.sn.Layers().List())
	recipes := s.sn.Layers().RecipeUsage()
	resp.Recipes, resp.RecipeBytes = recipes.Inodes, recipes.Bytes
	chains, err := s.sn.Chains(ctx, req.GetMeasure())
	if err != nil {
		return nil, answer(err)
	}
	resp.ChainImages, resp.ChainMounts = int64(chains.Images), int64(chains.Mounts)
	if req.GetMeasure() {
		u, err := s.sn.Layers().Measure(ctx)
		if err != nil {
			return nil, answer(err)
		}
		resp.StoredBytes = u.Bytes + chains.Usage.Bytes
		resp.StoredInodes = u.Inodes + chains.Usage.Inodes
	}
	if err := addSpace(resp, s.opts.Root); err != nil {
		return nil, answer(err)
	}
	return resp, nil
}

func addTotals(resp *dedupv1.StatusResponse, list []layer.Listed) {
	resp.Layers = int64(len(list))
	for _, l := range list {
		resp.DiffIds += int64(len(l.DiffIDs))
		resp.Uses += int64(l.Holds)
		resp.LogicalBytes += l.Bytes * int64(l.Holds)
		resp.LogicalEntries += l.Entries * int64(l.Holds)
	}
}

func addSpace(resp *dedupv1.StatusResponse, root string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", root, err)
	}
	// Both leave out what is reserved for root, so that the rest is used, as df and doctor say.
	resp.FreeBytes = int64(st.Bavail) * st.Frsize
	resp.TotalBytes = int64(st.Blocks-st.Bfree+st.Bavail) * st.Frsize
	resp.FreeInodes, resp.TotalInodes = int64(st.Ffree), int64(st.Files)
	return nil
}

// Layers lists every layer.
func (s *Server) Layers(context.Context, *dedupv1.LayersRequest) (*dedupv1.LayersResponse, error) {
	return &dedupv1.LayersResponse{Layers: layers(s.sn.Layers().List())}, nil
}

// Equal lists the layers that are equal but for mtime, uid and gid.
func (s *Server) Equal(context.Context, *dedupv1.EqualRequest) (*dedupv1.EqualResponse, error) {
	resp := &dedupv1.EqualResponse{}
	for _, g := range layer.EqualGroups(s.sn.Layers().List()) {
		resp.Groups = append(resp.Groups, &dedupv1.EqualGroup{
			PayloadDigest: g[0].Payload.Digest().String(),
			Entries:       g[0].Entries,
			LogicalBytes:  g[0].Bytes,
			Layers:        layers(g),
		})
	}
	return resp, nil
}

func layers(list []layer.Listed) []*dedupv1.Layer {
	out := make([]*dedupv1.Layer, 0, len(list))
	for _, l := range list {
		m := &dedupv1.Layer{
			Id: l.ID.Hex(), PayloadDigest: l.Payload.Digest().String(), Fidelity: string(l.Fidelity),
			Entries: l.Entries, LogicalBytes: l.Bytes,
			AddedBytes: l.Usage.Bytes, AddedInodes: l.Usage.Inodes, Uses: int64(l.Holds),
		}
		for _, d := range l.DiffIDs {
			m.DiffIds = append(m.DiffIds, d.Digest().String())
		}
		out = append(out, m)
	}
	return out
}

// answer gives an error its gRPC code.
func answer(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.FromContextError(err).Err()
	}
	return status.Error(codes.Internal, err.Error())
}
