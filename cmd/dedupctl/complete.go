package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v2"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

const defaultContainerd = "/run/containerd/containerd.sock"

// Completion is what `dedupctl complete --json` prints.
type Completion struct {
	Images  []Completed     `json:"images"`
	Fetched []CompletedBlob `json:"fetched"` // of all images, from a registry
	Made    []CompletedBlob `json:"made"`    // of all images, from the store
	// PresentBytes are those of the blobs that were there already.
	PresentBytes int64 `json:"present_bytes"`
	FetchedBytes int64 `json:"fetched_bytes"`
	MadeBytes    int64 `json:"made_bytes"`
}

// Completed is one image.
type Completed struct {
	Image        string          `json:"image"`
	Fetched      []CompletedBlob `json:"fetched"`
	Made         []CompletedBlob `json:"made"`
	PresentBytes int64           `json:"present_bytes"`
	FetchedBytes int64           `json:"fetched_bytes"`
	MadeBytes    int64           `json:"made_bytes"`
	Error        string          `json:"error,omitempty"`
}

// CompletedBlob is a blob that was missing.
type CompletedBlob struct {
	Digest    string `json:"digest"`
	MediaType string `json:"media_type"`
	Bytes     int64  `json:"bytes"`
}

func completeCommand() *cli.Command {
	return &cli.Command{
		Name:      "complete",
		Usage:     "fetch the blobs that a pull left out, or that were dropped since their layers are stored here",
		ArgsUsage: "[IMAGE...]",
		Description: "A pull can skip the download of known layers, and blobs = \"drop\" removes blobs. They are needed\n" +
			"by ctr image push, export and convert, and by other snapshotters.\n" +
			"The daemon first makes again what it can from the files in its store, without a network. This fetches the\n" +
			"other missing blobs from the registry that IMAGE names. It checks each blob's digest, and keeps the blob as\n" +
			"long as the image; with blobs = \"drop\" for an hour. It unpacks no layer.\n" +
			"Without IMAGE: all images of the namespace.\n" +
			"Exit code 1 also when an image could not be completed, after all others were; the output names it.",
		Flags: append(registryFlags(),
			&cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Usage: "containerd `NAMESPACE` of the image",
				Value: "default", EnvVars: []string{"CONTAINERD_NAMESPACE"}},
			&cli.BoolFlag{Name: "all-platforms", Usage: "fetch what belongs to other platforms too"},
		),
		Action: runComplete,
	}
}

// registryFlags are those of the verbs that fetch blobs.
func registryFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "containerd-address", Usage: "containerd's unix `SOCKET`", Value: defaultContainerd},
		&cli.StringFlag{Name: "user", Aliases: []string{"u"},
			Usage: "`USER[:PASSWORD]` at the registry; the password may stand in DEDUP_REGISTRY_PASSWORD"},
		&cli.StringFlag{Name: "hosts-dir", Usage: "`DIR` with a hosts.toml for each registry",
			Value: "/etc/containerd/certs.d"},
		&cli.BoolFlag{Name: "plain-http", Usage: "the registry speaks HTTP without TLS"},
	}
}

func runComplete(c *cli.Context) error {
	ctx := namespaces.WithNamespace(c.Context, c.String("namespace"))
	ctd, err := dialContainerd(ctx, c.String("containerd-address"))
	if err != nil {
		return err
	}
	defer ctd.Close()
	names := c.Args().Slice()
	if len(names) == 0 {
		if names, err = namesOfImages(ctx, ctd); err != nil {
			return err
		}
	}
	all := Completion{Images: []Completed{}, Fetched: []CompletedBlob{}, Made: []CompletedBlob{}}
	var opts fetchOptions
	// Without the daemon everything comes from registries.
	if conn, err := dial(ctx, address(c)); err == nil {
		defer conn.Close()
		opts.daemon = dedupv1.NewControlClient(conn)
	}
	var first error
	failed := 0
	for _, name := range names {
		done, err := fetchMissing(ctx, c, ctd, name, opts)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			done.Image, done.Error = name, err.Error()
			if first == nil {
				first = err
			}
			failed++
		}
		all.add(done)
	}
	if len(names) == 1 && first != nil {
		return first
	}
	if err := print(c, all, printCompletion); err != nil {
		return err
	}
	if first != nil {
		return fmt.Errorf("complete: %d of %s not complete: the first because of: %w", failed,
			plural(int64(len(names)), "image", "images"), first)
	}
	return nil
}

func (all *Completion) add(done Completed) {
	if done.Fetched == nil {
		done.Fetched, done.Made = []CompletedBlob{}, []CompletedBlob{}
	}
	all.Images = append(all.Images, done)
	all.Fetched = append(all.Fetched, done.Fetched...)
	all.PresentBytes += done.PresentBytes
	all.FetchedBytes += done.FetchedBytes
	all.Made = append(all.Made, done.Made...)
	all.MadeBytes += done.MadeBytes
}

// namesOfImages returns one name of each image of the namespace.
func namesOfImages(ctx context.Context, ctd *client.Client) (names []string, err error) {
	list, err := ctd.ImageService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	byTarget := map[digest.Digest][]string{}
	for _, img := range list {
		byTarget[img.Target.Digest] = append(byTarget[img.Target.Digest], img.Name)
	}
	for _, all := range byTarget {
		slices.Sort(all)
		names = append(names, nameOf(all))
	}
	slices.Sort(names)
	return names, nil
}

// fetchOptions say what fetchMissing fetches.
type fetchOptions struct {
	// verify looks whether blobs that are there are what their digests say, and fetches the others again.
	verify bool
	// chains are chainIDs: only the layers that end one of them are needed. None is all.
	chains map[string]bool
	// daemon makes blobs again; nil for none.
	daemon dedupv1.ControlClient
}

// fetchMissing fetches the blobs of an image, in the namespace of ctx, that are not in the content store.
func fetchMissing(ctx context.Context, c *cli.Context, ctd *client.Client, name string, opts fetchOptions) (
	Completed, error,
) {
	ns, _ := namespaces.Namespace(ctx)
	img, err := ctd.ImageService().Get(ctx, name)
	if errdefs.IsNotFound(err) {
		return Completed{}, fmt.Errorf("no image %q in containerd's namespace %q: see `ctr -n %s images ls -q`, or name "+
			"the namespace with --namespace", name, ns, ns)
	}
	if err != nil {
		return Completed{}, fmt.Errorf("look up image %s: %w", name, err)
	}
	if opts.verify {
		if err := dropDamaged(ctx, ctd, img); err != nil {
			return Completed{}, fmt.Errorf("verify the blobs of %s: %w", name, err)
		}
	}
	fetcher, err := resolver(c).Fetcher(ctx, name)
	if err != nil {
		return Completed{}, fmt.Errorf("registry of %s: %w", name, err)
	}
	// What a push or a repair needs later tells where it came from, as after a pull.
	source, err := docker.AppendDistributionSourceLabel(ctd.ContentStore(), name)
	if err != nil {
		return Completed{}, fmt.Errorf("registry of %s: %w", name, err)
	}
	ctx, done, err := ctd.WithLease(ctx)
	if err != nil {
		return Completed{}, fmt.Errorf("take a lease: %w", err)
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // it would expire by itself
	match := platforms.Only(platforms.DefaultSpec())
	if c.Bool("all-platforms") {
		match = platforms.All
	}
	out := &completion{store: ctd.ContentStore(), leases: ctd.LeasesService(), fetcher: fetcher, source: source,
		daemon: opts.daemon, namespace: ns,
		result: Completed{Image: name, Fetched: []CompletedBlob{}, Made: []CompletedBlob{}}}
	if len(opts.chains) > 0 {
		out.only = wantedBlobs(ctx, out.store, img.Target, match, opts.chains)
	}
	stop := showProgress(c, func() string { return size(out.soFar(ctx)) + " made or fetched" })
	err = out.run(ctx, img, match)
	stop()
	if err != nil {
		return out.result, fmt.Errorf("complete %s: %w%s", name, err, registryHint(err))
	}
	return out.result, nil
}

// wantedBlobs returns the blobs of the layers that end one of chains; nil, which is all, where the image does not tell.
func wantedBlobs(ctx context.Context, store content.Store, target ocispec.Descriptor, match platforms.MatchComparer,
	chains map[string]bool,
) map[digest.Digest]bool {
	manifest, err := images.Manifest(ctx, store, target, match)
	if err != nil {
		return nil
	}
	diffIDs, err := images.RootFS(ctx, store, manifest.Config)
	if err != nil || len(diffIDs) != len(manifest.Layers) {
		return nil
	}
	found := map[digest.Digest]bool{}
	for i, chain := range identity.ChainIDs(diffIDs) {
		if chains[chain.String()] {
			found[manifest.Layers[i].Digest] = true
		}
	}
	if len(found) == 0 {
		return nil
	}
	return found
}

func printCompletion(w io.Writer, all Completion) {
	for _, v := range all.Images {
		switch {
		case v.Error != "":
			fmt.Fprintln(w, v.Error)
		case len(v.Fetched)+len(v.Made) == 0:
			fmt.Fprintf(w, "%s is complete: all of its %s are there.\n", v.Image, size(v.PresentBytes))
		default:
			table(w, func(w io.Writer) {
				fmt.Fprintln(w, "BLOB\tSIZE\tFROM\tTYPE")
				for _, b := range v.Made {
					fmt.Fprintf(w, "%s\t%s\tstore\t%s\n", short(b.Digest), size(b.Bytes), b.MediaType)
				}
				for _, b := range v.Fetched {
					fmt.Fprintf(w, "%s\t%s\tregistry\t%s\n", short(b.Digest), size(b.Bytes), b.MediaType)
				}
			})
			fmt.Fprintf(w, "\n%s of %s made from the store, %s; %s fetched, %s; %s were there.\n",
				plural(int64(len(v.Made)), "blob", "blobs"), v.Image, size(v.MadeBytes), count(int64(len(v.Fetched))),
				size(v.FetchedBytes), size(v.PresentBytes))
		}
	}
	if len(all.Images) > 1 {
		fmt.Fprintf(w, "\n%s, %s made from the store, %s fetched, %s were there.\n",
			plural(int64(len(all.Images)), "image", "images"), size(all.MadeBytes), size(all.FetchedBytes),
			size(all.PresentBytes))
	}
}

// dialContainerd connects, and says what to do where that fails.
func dialContainerd(ctx context.Context, socket string) (*client.Client, error) {
	probe, err := dial(ctx, socket)
	if err != nil {
		return nil, explainDial(socket, "containerd", "--containerd-address", err)
	}
	probe.Close()
	c, err := client.New(socket, client.WithTimeout(10*time.Second))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", socket, err)
	}
	return c, nil
}

// resolver finds registries as ctr and nerdctl do.
func resolver(c *cli.Context) remotes.Resolver {
	opts := dockerconfig.HostOptions{}
	if dir := c.String("hosts-dir"); dir != "" {
		opts.HostDir = dockerconfig.HostDirFromRoot(dir)
	}
	if c.Bool("plain-http") {
		opts.DefaultScheme = "http"
	}
	if user := c.String("user"); user != "" {
		name, password, given := strings.Cut(user, ":")
		if !given {
			password = os.Getenv("DEDUP_REGISTRY_PASSWORD")
		}
		opts.Credentials = func(string) (string, string, error) { return name, password, nil }
	}
	return docker.NewResolver(docker.ResolverOptions{Hosts: dockerconfig.ConfigureHosts(c.Context, opts)})
}

func registryHint(err error) string {
	switch text := err.Error(); {
	case strings.Contains(text, "HTTP response to HTTPS client"):
		return "\n  the registry speaks plain HTTP: --plain-http"
	case strings.Contains(text, "unexpected commit digest"), strings.Contains(text, "unexpected commit size"),
		strings.Contains(text, "failed size validation"):
		return "\n  the registry serves other bytes than the image names; none of them were kept. Ask its operator,\n" +
			"  or push the image there again from where it is complete"
	case strings.Contains(text, "connection refused"), strings.Contains(text, "no such host"),
		strings.Contains(text, "i/o timeout"):
		return "\n  the registry cannot be reached: try again when it can, or name a mirror in a hosts.toml below\n" +
			"  --hosts-dir. Containers of the image go on, and start as before"
	case errdefs.IsUnauthorized(err), strings.Contains(text, "401"), strings.Contains(text, "403"):
		return "\n  the registry wants to know who asks: --user USER, and the password in DEDUP_REGISTRY_PASSWORD"
	case errdefs.IsNotFound(err):
		return "\n  the registry does not have it any more: push the image there again from where it is complete"
	}
	return ""
}

// dropDamaged removes the blobs of an image that are not what their digests say from the content store, in all
// namespaces: they share the file.
func dropDamaged(ctx context.Context, ctd *client.Client, img images.Image) error {
	store := ctd.ContentStore()
	var bad []digest.Digest
	check := func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		ok, err := verifyBlob(ctx, store, desc)
		if err == nil && !ok {
			bad = append(bad, desc.Digest)
			return nil, images.ErrSkipDesc
		}
		return nil, err
	}
	children := func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		list, err := images.Children(ctx, store, desc)
		if errdefs.IsNotFound(err) {
			return nil, nil // of another platform
		}
		return list, err
	}
	err := images.Walk(ctx, images.Handlers(images.HandlerFunc(check), images.HandlerFunc(children)), img.Target)
	if err != nil || len(bad) == 0 {
		return err
	}
	spaces, err := ctd.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	for _, ns := range spaces {
		for _, d := range bad {
			if err := store.Delete(namespaces.WithNamespace(ctx, ns), d); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("remove damaged blob %s: %w", d, err)
			}
		}
	}
	// The files go with a garbage collection. Until then a fetch would take them for fetched.
	lease, err := ctd.LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		return err
	}
	return ctd.LeasesService().Delete(ctx, lease, leases.SynchronousDelete)
}

// verifyBlob reports whether a blob is what its digest says; one that is not there is.
func verifyBlob(ctx context.Context, store content.Store, desc ocispec.Descriptor) (bool, error) {
	ra, err := store.ReaderAt(ctx, desc)
	if errdefs.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer ra.Close()
	verifier := desc.Digest.Verifier()
	if _, err := io.Copy(verifier, content.NewReader(ra)); err != nil {
		return false, nil // a disk that cannot read it
	}
	return verifier.Verified(), nil
}
