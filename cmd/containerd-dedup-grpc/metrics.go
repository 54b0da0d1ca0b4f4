package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
)

// collector turns what the snapshotter says of itself into metrics at the moment of a scrape.
type collector struct {
	sn      *snapshotter.Snapshotter
	trimmer *blobs.Trimmer
	root    string
}

// Describe sends nothing: the collector is unchecked, and its names are checked by a test.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect looks at no file of the store but the chain images: what it costs grows with layers and snapshots, not with
// objects.
func (c collector) Collect(out chan<- prometheus.Metric) {
	e := emitter{out}
	e.gauge("dedup_build_info", "1, with the daemon's version.", 1, "version", version)
	chains, err := c.sn.Chains(context.Background(), false)
	if err != nil {
		e.broken("dedup_chain_images", err)
	} else {
		e.gauge("dedup_chain_images", "Chain images on the disk.", float64(chains.Images))
		e.gauge("dedup_chain_mounts", "Chain images that are mounted.", float64(chains.Mounts))
		e.gauge("dedup_pack_mounts", "Packs that are mounted below shared chain images.", float64(chains.Packs))
	}
	c.holdings(e, chains.Usage)
	c.snapshots(e)
	c.work(e)
	trimmed := c.trimmer.Totals()
	e.count("dedup_trimmed_blobs_total", "Blobs removed from containerd's content store: their layers are stored here.",
		float64(trimmed.Blobs))
	e.count("dedup_trimmed_bytes_total", "What these blobs had occupied.", float64(trimmed.Bytes))
	e.count("dedup_trim_errors_total", "Failed attempts to remove blobs; the daemon tries again.",
		float64(trimmed.Errors))
	c.recipes(e)
	collectIngests(e, c.sn.Layers().Stats())
	c.disk(e)
}

// recipes are what it takes to make blobs again.
func (c collector) recipes(e emitter) {
	kept, did := c.sn.Layers().RecipeUsage(), c.sn.Layers().RecipeStats()
	e.gauge("dedup_recipes", "Blobs that can be made again from the store.", float64(kept.Inodes))
	e.gauge("dedup_recipe_bytes", "What the recipes of these blobs occupy.", float64(kept.Bytes))
	const tried = "Dropped blobs by what became of their recipe: kept, no_encoder (none makes the blob), too_large " +
		"(the layer has too little of the blob), error."
	for result, n := range map[string]int64{
		"kept": did.Made, "no_encoder": did.NoEncoder, "too_large": did.TooLarge, "error": did.Failed,
	} {
		e.count("dedup_recipes_made_total", tried, float64(n), "result", result)
	}
	const followed = "Requests for blobs that have a recipe, by whether the blob was made."
	e.count("dedup_blobs_made_total", followed, float64(did.Followed), "result", "made")
	e.count("dedup_blobs_made_total", followed, float64(did.Useless), "result", "error")
	e.count("dedup_blobs_made_bytes_total", "The compressed size of the blobs that were made.", float64(did.FollowedBytes))
}

// holdings are what the store holds, and what it would hold without deduplication.
func (c collector) holdings(e emitter, chains layer.Usage) {
	list, used := c.sn.Layers().List(), c.sn.Layers().Used()
	used.Bytes, used.Inodes = used.Bytes+chains.Bytes, used.Inodes+chains.Inodes
	var logical layer.Usage
	for _, l := range list {
		logical.Bytes += l.Bytes * int64(l.Holds)
		logical.Inodes += l.Entries * int64(l.Holds)
	}
	e.gauge("dedup_layers", "Layers in the store.", float64(len(list)))
	e.gauge("dedup_objects", "Payloads in the store.", float64(c.sn.Layers().Objects()))
	packs := c.sn.Layers().Packs().Stats()
	e.gauge("dedup_packs", "Files that hold payloads.", float64(packs.Packs))
	e.gauge("dedup_pack_bytes", "Bytes in packs, by whether something needs them.", float64(packs.Live), "state", "live")
	e.gauge("dedup_pack_bytes", "Bytes in packs, by whether something needs them.", float64(packs.Dead), "state", "dead")
	e.count("dedup_pack_merged_bytes_total", "Bytes that merging packs has copied.", float64(packs.Merged))
	e.gauge("dedup_stored_bytes", "What layers, payloads and chain images occupy.", float64(used.Bytes))
	e.gauge("dedup_stored_inodes", "Inodes that layers, payloads and chain images occupy.", float64(used.Inodes))
	e.gauge("dedup_logical_bytes", "Sizes of all regular files of all uses of layers: what plain directories would hold.",
		float64(logical.Bytes))
	e.gauge("dedup_logical_inodes", "Entries of all uses of layers: the inodes that plain directories would need.",
		float64(logical.Inodes))
	e.gauge("dedup_saved_bytes", "dedup_logical_bytes less dedup_stored_bytes.", float64(logical.Bytes-used.Bytes))
	e.gauge("dedup_saved_inodes", "dedup_logical_inodes less dedup_stored_inodes.", float64(logical.Inodes-used.Inodes))
	if used.Bytes > 0 {
		e.gauge("dedup_ratio", "dedup_logical_bytes divided by dedup_stored_bytes.",
			float64(logical.Bytes)/float64(used.Bytes))
	}
}

func (c collector) snapshots(e emitter) {
	counts := map[snapshots.Kind]int{snapshots.KindActive: 0, snapshots.KindView: 0, snapshots.KindCommitted: 0}
	err := c.sn.Walk(context.Background(), func(_ context.Context,
		i snapshots.Info) error {
		counts[i.Kind]++
		return nil
	})
	if err != nil {
		e.broken("dedup_snapshots", err)
		return
	}
	for kind, n := range counts {
		e.gauge("dedup_snapshots", "Snapshots by kind.", float64(n), "kind", strings.ToLower(kind.String()))
	}
}

// work is what the snapshotter has done since it was started.
func (c collector) work(e emitter) {
	did := c.sn.Stats()
	for a, n := range did.Answers {
		result := "miss"
		if a.Hit {
			result = "hit"
		}
		e.count("dedup_layer_requests_total",
			"Layers that were asked for or brought in, by door, by whether the store had them, and why.",
			float64(n), "door", a.Door, "result", result, "reason", a.Reason)
	}
	e.count("dedup_chain_builds_total", "Chain images that were built.", float64(did.Builds))
	e.count("dedup_chain_build_seconds_total", "Time that building chain images took.", did.BuildTime.Seconds())
	builds, ingests := c.sn.Builds(), c.sn.Layers().Stats().Running
	running(e, "build", builds.Running, builds.Oldest, builds.Bytes)
	running(e, "ingest", ingests.Count, ingests.Oldest, ingests.Bytes)
	kept, most := layer.Memory(c.sn.Layers())
	const memory = "What max_memory bounds: entries, inline data and zstd windows of ingests and builds."
	e.gauge("dedup_memory_bytes", memory, float64(kept), "state", "kept")
	e.gauge("dedup_memory_bytes", memory, float64(most), "state", "max")
	e.count("dedup_chain_rebuilds_total", "Chain images that did not mount and were built again.", float64(did.Rebuilt))
	if !did.Checked.IsZero() {
		e.gauge("dedup_fsck_timestamp_seconds", "When the last dedupctl fsck since the start ended.",
			float64(did.Checked.Unix()))
		for kind, n := range did.Findings {
			e.gauge("dedup_fsck_findings", "What the last dedupctl fsck found and did not repair, by kind.", float64(n), "kind",
				string(kind))
		}
	}
	stored := c.sn.Layers().Stats()
	const gcErrors = "Things that could not be removed: payloads or trees of layers, directories, chain images and " +
		"mounts of snapshots."
	e.count("dedup_gc_errors_total", gcErrors, float64(stored.RemoveErrors), "what", "layer")
	e.count("dedup_gc_errors_total", gcErrors, float64(did.RemoveErrors), "what", "snapshot")
	e.count("dedup_gc_layers_total", "Layers that were removed because nothing named them any more.",
		float64(stored.RemovedLayers))
	e.count("dedup_gc_packs_total", "Packs that were removed because nothing named their payloads any more.",
		float64(stored.Removed.Inodes))
	e.count("dedup_gc_bytes_total", "What removed packs had occupied.", float64(stored.Removed.Bytes))
	e.gauge("dedup_swept_files", "Leftovers of an unclean stop that the last start removed.", float64(stored.Swept))
	e.gauge("dedup_damaged_layers", "Layers that are out of service since their tree or an object is damaged: their "+
		"images cannot be mounted (dedupctl fsck --repair).", float64(stored.Damaged))
}

// running is work at this moment.
func running(e emitter, work string, count int, oldest time.Time, bytes int64) {
	e.gauge("dedup_work_running", "Ingests that are running, and chain images that are being built or wait for memory.",
		float64(count), "work", work)
	age := 0.0
	if count > 0 {
		age = time.Since(oldest).Seconds()
	}
	e.gauge("dedup_work_oldest_seconds", "How long the oldest ingest or build has been running; 0 if there is none.", age,
		"work", work)
	e.gauge("dedup_work_memory_bytes",
		"Memory of ingests: payloads on their way to the disk. Of builds: an estimate from the entries of their layers.",
		float64(bytes), "work", work)
}

func collectIngests(e emitter, stored layer.Stats) {
	for source, in := range map[string]layer.Ingests{"blob": stored.Blobs, "directory": stored.Dirs} {
		const ingests = "Blobs and directories that were read, by whether their layer was new."
		e.count("dedup_ingests_total", ingests, float64(in.New), "source", source, "result", "new")
		e.count("dedup_ingests_total", ingests, float64(in.Same), "source", source, "result", "same")
		e.count("dedup_ingest_bytes_total", "Bytes that were read: of uncompressed tars, or of a directory's files.",
			float64(in.Bytes), "source", source)
		e.count("dedup_ingest_added_bytes_total", "What ingests added to the disk.", float64(in.Added.Bytes), "source",
			source)
		e.count("dedup_ingest_added_inodes_total", "Inodes that ingests added to the disk.", float64(in.Added.Inodes),
			"source", source)
		for stage, took := range in.Stages {
			e.count("dedup_ingest_seconds_total", "Time that the stages of ingests took; ingests run side by side.",
				took.Seconds(), "source", source, "stage", stage)
		}
	}
	for kind, n := range stored.Failed {
		e.count("dedup_ingest_errors_total", "Ingests that failed, by what went wrong.", float64(n), "kind", string(kind))
	}
}

// disk is the file system of the root; inodes are 0 where it has no fixed number of them.
func (c collector) disk(e emitter) {
	var st unix.Statfs_t
	if err := unix.Statfs(c.root, &st); err != nil {
		e.broken("dedup_root_free_bytes", err)
		return
	}
	e.gauge("dedup_root_free_bytes", "Free space of the file system of root, without what is reserved.",
		float64(st.Bavail)*float64(st.Frsize))
	e.gauge("dedup_root_size_bytes", "Size of the file system of root, without what is reserved.",
		float64(st.Blocks-st.Bfree+st.Bavail)*float64(st.Frsize))
	e.gauge("dedup_root_free_inodes", "Free inodes of the file system of root.", float64(st.Ffree))
	e.gauge("dedup_root_size_inodes", "Inodes of the file system of root.", float64(st.Files))
}

// emitter sends metrics; labels are names and values in turn.
type emitter struct{ out chan<- prometheus.Metric }

func (e emitter) gauge(name, help string, v float64, labels ...string) {
	e.send(prometheus.GaugeValue, name, help, v, labels)
}

func (e emitter) count(name, help string, v float64, labels ...string) {
	e.send(prometheus.CounterValue, name, help, v, labels)
}

func (e emitter) send(kind prometheus.ValueType, name, help string, v float64, labels []string) {
	var names, values []string
	for i := 0; i < len(labels); i += 2 {
		names, values = append(names, labels[i]), append(values, labels[i+1])
	}
	e.out <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, names, nil), kind, v, values...)
}

// broken makes the scrape say what could not be found out; the rest of it still comes.
func (e emitter) broken(name string, err error) {
	e.out <- prometheus.NewInvalidMetric(prometheus.NewDesc(name, "", nil, nil), err)
}

// serveMetrics answers Prometheus until stop.
func serveMetrics(ctx context.Context, address string, calls calls, holds collector) (stop func(), err error) {
	reg := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{
		calls.errors, calls.seconds, holds,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metricsHandler(reg, log.G(ctx)))
	stop, err = serveHTTP(ctx, address, &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second,
		WriteTimeout: time.Minute})
	if err != nil {
		return nil, fmt.Errorf("metrics_address: %w", err)
	}
	return stop, nil
}

// metricsHandler answers a scrape in one piece, once all is collected: promhttp logs each metric family that it cannot
// send, and a scraper that hung up left a hundred lines.
func metricsHandler(from prometheus.Gatherer, errs promhttp.Logger) http.Handler {
	h := promhttp.HandlerFor(from, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError, ErrorLog: errs,
		MaxRequestsInFlight: 2})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := answer{ResponseWriter: w, code: http.StatusOK}
		h.ServeHTTP(&a, r)
		w.WriteHeader(a.code)
		_, _ = a.body.WriteTo(w) // the scraper has gone
	})
}

// answer keeps what is written.
type answer struct {
	http.ResponseWriter
	code int
	body bytes.Buffer
}

func (a *answer) WriteHeader(code int) { a.code = code }

func (a *answer) Write(p []byte) (int, error) { return a.body.Write(p) }
