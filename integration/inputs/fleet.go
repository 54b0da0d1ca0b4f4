package inputs

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

const (
	// OlderWheels is the directory, in that of Wheels, with what first releases have in an older version.
	OlderWheels = "older"
	// Pip is the path there of a pip that runs without being installed.
	Pip = "wheels/pip-" + pipVersion + "-py3-none-any.whl/pip"
)

// Wheels returns the directory with the downloaded packages.
func (s *Set) Wheels(ctx context.Context) (string, error) {
	unlock, err := node.Lock(ctx, filepath.Join(s.dir, "lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if err := s.download(ctx, "wheels", s.kit.requirements); err != nil {
		return "", err
	}
	return s.dir, s.download(ctx, OlderWheels, older)
}

// older are the versions that first releases were built with: between two releases some packages move on.
const older = `attrs==25.4.0
certifi==2025.10.5
click==8.3.0
django==5.2.8
idna==3.11
redis==7.0.1
requests==2.32.5
six==1.16.0
`

// everywhere is what every service imports.
const everywhere = "async-timeout requests certifi idna charset-normalizer urllib3 six attrs click sentry-sdk " +
	"python-dateutil pyyaml typing-extensions"

// services are the packages of a fleet's services, beside those that all have.
var services = []struct{ name, packages, check string }{
	{"web", "django asgiref sqlparse djangorestframework drf-spectacular psycopg2-binary redis jsonschema referencing " +
		"rpds-py jsonschema-specifications uritemplate inflection phonenumberslite",
		"import django.db.models, rest_framework, redis"},
	{"worker", "django asgiref sqlparse celery billiard kombu amqp vine tzlocal click-didyoumean click-plugins " +
		"click-repl prompt-toolkit wcwidth redis psycopg2-binary boto3 botocore s3transfer jmespath",
		"import django.db.models, celery, boto3"},
	{"ingest", "sentry-arroyo confluent-kafka sentry-kafka-schemas sentry-protos protobuf fastjsonschema msgpack " +
		"python-rapidjson redis regex", "import confluent_kafka, msgpack, redis"},
	{"storage", "google-cloud-storage google-cloud-core google-api-core google-auth google-crc32c " +
		"google-resumable-media googleapis-common-protos protobuf proto-plus pyasn1 pyasn1-modules cryptography cffi " +
		"pycparser boto3 botocore s3transfer jmespath", "import google.cloud.storage, boto3"},
	{"query", "snuba-sdk parsimonious regex confluent-kafka redis opentelemetry-api opentelemetry-sdk " +
		"opentelemetry-semantic-conventions grpcio protobuf jsonschema referencing rpds-py jsonschema-specifications",
		"import snuba_sdk, redis, grpc"},
}

// Release is the application layer of one service of a fleet, on the Debian layer.
type Release struct {
	Service string
	Number  int // 1 or 2
	Layer   *image.Layer
}

// Fleet returns the application layers of five services in two releases each, all on the same Debian layer. Each
// has a pip install of its own; services share packages, and between releases some are upgraded.
func (s *Set) Fleet(ctx context.Context) ([]Release, error) {
	base, err := s.rootfs(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := s.Wheels(ctx); err != nil {
		return nil, err
	}
	var fleet []Release
	for number := 1; number <= 2; number++ {
		for _, sv := range services {
			in := install{name: fmt.Sprintf("%s-%d", sv.name, number), check: sv.check}
			if in.packages, err = s.pins(sv.packages, number == 1); err != nil {
				return nil, fmt.Errorf("service %s: %w", sv.name, err)
			}
			l, err := s.cached(ctx, in.name, func(ctx context.Context) (*image.Layer, error) { return s.install(ctx, base, in) })
			if err != nil {
				return nil, err
			}
			fleet = append(fleet, Release{sv.name, number, l})
		}
	}
	return fleet, nil
}

// pins are the requirements of some packages and of those that every service has.
func (s *Set) pins(packages string, first bool) (pins []string, err error) {
	known := lines(s.kit.requirements)
	if first {
		known = append(lines(older), known...) // the first that is found counts
	}
	for _, name := range strings.Fields(packages + " " + everywhere) {
		i := slices.IndexFunc(known, func(pin string) bool { return strings.HasPrefix(pin, name+"==") })
		if i < 0 {
			return nil, fmt.Errorf("package %s is not among the requirements", name)
		}
		pins = append(pins, known[i])
	}
	return pins, nil
}
