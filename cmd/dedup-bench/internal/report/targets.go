package report

import "fmt"

// descriptions of scenarios, for heads of tables and plots.
var descriptions = []struct{ name, text string }{
	{"cold", "pull of an image that shares nothing with the node"},
	{"rebuild", "pull of the same content built again: other times and owners, from another registry"},
	{"known", "pull of the same layers on another parent, from another registry"},
	{"delete", "removal of an image while a rebuild of it stays, and then of the others, until the file system has " +
		"the space back"},
	{"start", "from the request for a container to its first output"},
	{"mapped", "the same, each container in a user namespace with another mapping"},
	{"read", "all files of a mounted root, and Python imports in a container; cold and warm"},
	{"restart", "snapshotter and containerd until they serve again, with many snapshots"},
	{"layers100", "100 layers in ten pulls at once, every file in four of the layers"},
	{"commit", "layers of what a container or a build changed in a large image"},
	{"build", "BuildKit: steps over a large image, each with one new file, and the export of their layers"},
	{"python", "five services in two releases, each with a real pip install; all mounted and read at last"},
	{"fleet", "the services of one system, each with its own pip install, in two releases"},
	{"memory", "page cache after reading ten near-equal images"},
	{"scale", "many layers, files and snapshots"},
	{"corpus-node", "a Node.js service: npm packages, and Node.js itself"},
	{"corpus-java-thin", "a Java service: Java from Debian, and the service's jars side by side, as Jib lays them out"},
	{"corpus-java-fat", "the same Java service as one jar that holds the others, as Spring Boot packs it"},
	{"corpus-binary", "one static Go program on Debian; a rebuild stamps another version into it"},
	{"corpus-debian", "Debian with a few tools, each image one layer; the upgrade takes some from backports"},
	{"corpus-ml", "a machine learning service: tensorflow for CPUs, scipy, pandas, pyarrow and others"},
}

// Describe says in half a sentence what a scenario measures.
func Describe(scenario string) string {
	for _, d := range descriptions {
		if d.name == scenario {
			return d.text
		}
	}
	return "measured"
}

// target is a ratio that dedup should not exceed.
type target struct {
	reference        string
	scenario, metric string
	// against is the scenario of the reference's figure, "" for the same.
	against string
	want    float64
}

var wanted = []target{
	{"limit", "cold", "pull", "", 1.35},
	{"overlayfs", "cold", "pull", "", 0.36},
	{"overlayfs", "rebuild", "pull", "", 0.28},
	{"overlayfs", "known", "pull", "cold", 0.03},
	{"overlayfs", "delete", "one image of several: space back", "", 0.1},
	{"overlayfs", "delete", "the last images: space back", "", 0.1},
	{"overlayfs", "start", "first container", "", 1},
	{"overlayfs", "start", "tenth container", "", 1},
	{"overlayfs", "start", "20 at once, all", "", 1},
	{"overlayfs", "mapped", "20 more, median", "", 1.1},
	{"overlayfs", "read", "read everything, cold", "", 1},
	{"overlayfs", "read", "read everything, warm", "", 1.05},
	{"overlayfs", "read", "find, cold", "", 1},
	{"overlayfs", "read", "find, warm", "", 1.05},
	{"overlayfs", "read", "Python imports, cold", "", 0.95},
	{"overlayfs", "read", "Python imports, warm", "", 1},
	{"overlayfs", "layers100", "pull", "", 0.45},
	{"overlayfs", "layers100", "disk", "", 0.25},
	{"overlayfs", "commit", "1000 changed files", "", 1.1},
	{"overlayfs", "commit", "1000 changed files, CPU", "", 1.1},
	{"overlayfs", "commit", "10 commits of one file", "", 1.2},
	{"overlayfs", "commit", "10 commits of one file, CPU", "", 1.2},
	{"overlayfs", "build", "10 RUN steps", "", 1.3},
	{"overlayfs", "build", "10 RUN steps, CPU", "", 1.3},
	{"overlayfs", "build", "export of 10 layers", "", 1.2},
	{"overlayfs", "build", "export of 10 layers, CPU", "", 1.2},
	{"overlayfs", "fleet", "disk", "", 0.2},
	{"overlayfs", "fleet", "inodes", "", 0.1},
	{"overlayfs", "rebuild", "node's disk, blobs dropped", "", 0.04},
	{"overlayfs", "fleet", "node's disk, blobs dropped", "", 0.14},
	{"overlayfs", "memory", "page cache", "", 0.2},
	{"erofs", "cold", "pull", "", 0.8},
	{"erofs", "cold", "disk", "", 0.9},
	{"erofs", "rebuild", "pull", "", 0.75},
	{"erofs", "known", "pull", "cold", 0.05},
	{"erofs", "delete", "the last images: space back", "", 2},
	{"erofs", "start", "first container", "", 1},
	{"erofs", "start", "tenth container", "", 1},
	{"erofs", "read", "read everything, cold", "", 1.1},
	{"erofs", "read", "read everything, warm", "", 1},
	{"erofs", "read", "Python imports, cold", "", 0.95},
	{"erofs", "fleet", "disk", "", 0.2},
	{"erofs", "fleet", "inodes", "", 3},
	{"erofs", "memory", "page cache", "", 0.15},
}

// outcome is a target beside what was measured.
type outcome struct {
	target
	subject         string
	ratio, min, max float64
}

const judged = "dedup"

func (r Report) targets() []outcome {
	var list []outcome
	for _, t := range wanted {
		against := t.against
		if against == "" {
			against = t.scenario
		}
		a, inA := r.find(t.scenario, judged, t.metric)
		b, inB := r.find(against, t.reference, t.metric)
		if !inA || !inB || b.Min <= 0 {
			continue
		}
		list = append(list, outcome{t, judged, a.Median / b.Median, a.Min / b.Max, a.Max / b.Min})
	}
	return list
}

func (o outcome) title() string {
	title := o.scenario + ": " + o.metric
	if o.against != "" {
		title += " (by the " + o.against + " " + o.metric + ")"
	}
	return title
}

// ranged is from the best run over the worst to the worst over the best.
func (o outcome) ranged() string { return fmt.Sprintf("%.3f–%.3f", o.min, o.max) }

func (o outcome) verdict() string {
	if o.ratio <= o.want {
		return "met"
	}
	return "missed"
}
