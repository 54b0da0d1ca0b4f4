# Needs Go, git and make; what else a target needs it installs (as root, with apt-get) or
# names. Outputs go to bin/ and out/, caches to $DEDUP_CACHE, else
# ${XDG_CACHE_HOME:-~/.cache}/dedup-snapshotter.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

GO ?= go
export GOFLAGS ?= -buildvcs=false
COMMANDS := $(notdir $(patsubst %/,%,$(wildcard cmd/*/)))
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
TIMEOUT ?= 20m
RUNS ?= 3
FUZZTIME ?= 30s
BENCHTIME ?= 1s

# Where install puts things; DESTDIR is for packagers.
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
UNITDIR ?= $(SYSCONFDIR)/systemd/system
TMPFILESDIR ?= $(PREFIX)/lib/tmpfiles.d
ZSHDIR ?= $(PREFIX)/share/zsh/site-functions
BINDIR = $(DESTDIR)$(PREFIX)/bin
BASHDIR = $(DESTDIR)$(PREFIX)/share/bash-completion/completions
FISHDIR = $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
CONFDIR = $(DESTDIR)$(SYSCONFDIR)/containerd-dedup-grpc
DOCDIR = /usr/share/doc/containerd-dedup-grpc
UNIT = containerd-dedup-grpc.service
INSTALLED = $(addprefix bin/,$(filter-out dedup-bench,$(COMMANDS)))
# A Debian version starts with a digit: v1.2-3-gabc becomes 1.2+3+gabc, a bare commit 0+git.abc. A candidate comes before
# its release: v1.2-rc.1 becomes 1.2~rc.1.
DEBVERSION = $(shell echo '$(VERSION)' | sed -E 's/^v?([0-9]+\.)/\1/; t ok; s/^/0+git./; : ok; s/-rc/~rc/; s/[^A-Za-z0-9.+~]/+/g')

# Packages whose tests run under the race detector, where there is a C compiler, and the tests that leave it out.
RACE ?= ./content/... ./snapshotter/... ./cmd/...
NORACE := ^TestKilled

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.PHONY: build
build: ## the binaries, into bin/
	@mkdir -p bin
	@for name in $(COMMANDS); do \
		echo "building bin/$$name"; \
		CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-X main.version=$(VERSION)" -o "bin/$$name" "./cmd/$$name"; \
	done

.PHONY: demo
demo: build ## pull two builds of one app with overlayfs and with dedup, and compare (root)
	bin/dedup-bench demo --out out --runs $(RUNS)

.PHONY: setup
setup: build ## install and build what the tests need, or say what is missing
	bin/dedup-bench setup

.PHONY: gcc
gcc:
	@if ! command -v gcc >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing gcc and libc6-dev for the race detector"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get install -qy --no-install-recommends gcc libc6-dev >/dev/null 2>&1 || \
		{ apt-get update -q >/dev/null && apt-get install -qy --no-install-recommends gcc libc6-dev >/dev/null; } || true; \
	fi

.PHONY: test
test: setup gcc ## vet and all tests; those that need root or a kernel feature skip by name without
	$(GO) vet ./...
	@if command -v gcc >/dev/null; then \
		race=$$($(GO) list $(RACE)); \
		echo "$(GO) test -race $(RACE)"; \
		CGO_ENABLED=1 $(GO) test -race -timeout $(TIMEOUT) $$race; \
		echo "$(GO) test -run $(NORACE) ./snapshotter"; \
		$(GO) test -timeout $(TIMEOUT) -run '$(NORACE)' ./snapshotter; \
		echo "$(GO) test, all other packages"; \
		$(GO) test -timeout $(TIMEOUT) $$($(GO) list ./... | grep -vxF "$$race"); \
	else \
		echo "no gcc: the tests run without -race"; \
		$(GO) test -timeout $(TIMEOUT) ./...; \
	fi

# One test at a time: each builds.
.PHONY: test-clients
test-clients: setup ## BuildKit, nerdctl and Docker beside overlayfs, in full (root; builds dockerd, some ten minutes)
	DEDUP_CLIENTS=1 DEDUP_LONG=1 $(GO) test -v -parallel 1 -timeout 40m \
		-run '^(TestBuildKit|TestBuildKitMatrix|TestNerdctl|TestDocker|TestDockerBuild|TestImageAsARuntimesMount|TestTrimmedClients|TestTrimmedDocker)$$' ./integration

.PHONY: test-vm
test-vm: ## the store's and the snapshotter's tests under Debian's kernels with fs-verity, in QEMU (400 MB of downloads, half an hour)
	DEDUP_VM=1 $(GO) test -v -timeout 3h -run '^(TestUnitTests|TestImages|TestLargeSectors|TestQuota|TestSELinux)$$' ./integration/vm

.PHONY: test-kubelet
test-kubelet: setup ## a real kubelet on containerd with dedup, and the DaemonSet in a cluster of one node (builds both once, twenty minutes)
	DEDUP_KUBELET=1 $(GO) test -v -count 1 -timeout 90m -run '^(TestKubelet|TestCluster|TestCRIUserNamespace)$$' ./integration

.PHONY: test-containerd
test-containerd: setup ## containerd's own integration suites, and critest, on overlayfs and on dedup (root; half an hour)
	DEDUP_CONTAINERD=1 $(GO) test -v -count 1 -timeout 75m -run '^(TestContainerdSuites|TestCritest)$$' ./integration

# The table is written in any case: it shows what failed.
.PHONY: test-kernels
test-kernels: ## a node on each of Debian's kernels, in QEMU, and the table of docs/kernels.md (600 MB of downloads, two hours)
	@mkdir -p out
	status=0; DEDUP_VM=1 $(GO) test -v -count 1 -timeout 12h \
		-run '^(TestKernels|TestKernelDoctor|TestSwitchKernels|TestSwitchKernelsFull|TestKernelDemo)$$' ./integration/vm | \
		tee out/kernels.log || status=$$?; \
	$(GO) run ./integration/vm/table -docs docs/kernels.md out/kernels.log; exit $$status

.PHONY: test-kernel-scale
test-kernel-scale: ## 200 images and 100 containers at a time on Linux 6.1, in QEMU (half an hour)
	DEDUP_VM=1 $(GO) test -v -timeout 5h -run '^TestKernelScale$$' ./integration/vm | tee /dev/stderr | grep 'table: '

.PHONY: lint
lint: ## gofmt, vet, staticcheck, dead code, the tree's limits, and govulncheck where its database can be reached
	@unformatted=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go' | grep -v '\.pb\.go$$')); \
	if [ -n "$$unformatted" ]; then echo "not gofmt'ed:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	@dead=$$($(GO) tool deadcode -test ./...); if [ -n "$$dead" ]; then echo "dead code:"; echo "$$dead"; exit 1; fi
	$(GO) run ./.ci/limits
	@out=$$($(GO) tool govulncheck ./... 2>&1) || case "$$out" in \
		*"fetching vulnerabilities"*) echo "govulncheck: skipped, its database cannot be reached" ;; \
		*) echo "$$out"; exit 1 ;; \
	esac

.PHONY: proto
proto: ## Go code of the control API from proto/
	@if ! command -v protoc >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing protobuf-compiler"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get install -qy --no-install-recommends protobuf-compiler >/dev/null 2>&1 || \
		{ apt-get update -q >/dev/null && apt-get install -qy --no-install-recommends protobuf-compiler >/dev/null; }; \
	fi
	@command -v protoc >/dev/null || { echo "no protoc: install protobuf-compiler"; exit 1; }
	@mkdir -p out/tools
	$(GO) build -o out/tools/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	PATH="$(CURDIR)/out/tools:$$PATH" protoc -I proto --go_out=proto --go_opt=paths=source_relative \
		--go-grpc_out=proto --go-grpc_opt=paths=source_relative dedup/v1/control.proto

.PHONY: fuzz
fuzz: ## every fuzz test for FUZZTIME (default 30s)
	@for pkg in $$($(GO) list ./...); do \
		for name in $$($(GO) test -list '^Fuzz' "$$pkg" | grep '^Fuzz' || true); do \
			echo "$$pkg $$name"; \
			$(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x "$$pkg"; \
		done; \
	done

.PHONY: bench
bench: ## Go benchmarks of the hot paths, comparable with benchstat, into out/bench.txt
	@mkdir -p out
	$(GO) test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) -timeout 60m ./content/... ./snapshotter/... | tee out/bench.txt

.PHONY: benchmarks
benchmarks: build ## all scenarios with overlayfs, erofs and dedup side by side, into docs/benchmarks.md (root)
	bin/dedup-bench run --runs $(RUNS) --docs docs/benchmarks.md

# It builds nothing: sudo often has no Go.
.PHONY: screens
screens: build ## play an operator's session for real and write its outputs into docs/screens.md and docs/sentry.md (root)
	bin/dedup-bench screens --docs docs/screens.md --docs docs/sentry.md

# In a module of its own, so that the snapshotter does not depend on Prometheus's database.
.PHONY: dashboard
dashboard: build ## play some minutes on a node and draw Grafana's dashboard of them, into docs/monitoring/ (root)
	bin/dedup-bench dashboard --out docs/monitoring/dashboard.svg

.PHONY: install
install: ## what build has made, config, systemd unit and tmpfiles (PREFIX, SYSCONFDIR, UNITDIR, TMPFILESDIR, DESTDIR)
	@for f in $(INSTALLED); do [ -x "$$f" ] || { echo "no $$f: run 'make build' first, without sudo"; exit 1; }; done
	install -d "$(BINDIR)" "$(CONFDIR)" "$(DESTDIR)$(UNITDIR)" "$(DESTDIR)$(TMPFILESDIR)"
	install -m 0755 $(INSTALLED) "$(BINDIR)/"
	@if [ -e "$(CONFDIR)/config.toml" ]; then echo "keeping $(CONFDIR)/config.toml"; \
	else install -m 0600 deploy/config.toml "$(CONFDIR)/config.toml"; fi
	sed 's|/usr/local/bin|$(PREFIX)/bin|g' deploy/$(UNIT) > "$(DESTDIR)$(UNITDIR)/$(UNIT)"
	chmod 0644 "$(DESTDIR)$(UNITDIR)/$(UNIT)"
	install -m 0644 deploy/tmpfiles.conf "$(DESTDIR)$(TMPFILESDIR)/containerd-dedup-grpc.conf"
	bin/dedupctl completion bash | install -D -m 0644 /dev/stdin "$(BASHDIR)/dedupctl"
	bin/dedupctl completion zsh | install -D -m 0644 /dev/stdin "$(DESTDIR)$(ZSHDIR)/_dedupctl"
	bin/dedupctl completion fish | install -D -m 0644 /dev/stdin "$(FISHDIR)/dedupctl.fish"

.PHONY: uninstall
uninstall: ## what install put there; configuration and stored layers stay
	rm -f $(addprefix "$(BINDIR)"/,$(notdir $(INSTALLED)))
	rm -f "$(DESTDIR)$(UNITDIR)/$(UNIT)" "$(DESTDIR)$(TMPFILESDIR)/containerd-dedup-grpc.conf"
	rm -f "$(BASHDIR)/dedupctl" "$(DESTDIR)$(ZSHDIR)/_dedupctl" "$(FISHDIR)/dedupctl.fish"

.PHONY: deb
deb: build ## a Debian package, into out/
	@command -v dpkg-deb >/dev/null || { echo "no dpkg-deb: install dpkg"; exit 1; }
	rm -rf out/deb
	@$(MAKE) --no-print-directory install DESTDIR="$(CURDIR)/out/deb" PREFIX=/usr SYSCONFDIR=/etc \
		UNITDIR=/usr/lib/systemd/system TMPFILESDIR=/usr/lib/tmpfiles.d ZSHDIR=/usr/share/zsh/vendor-completions
	install -d out/deb/DEBIAN out/deb$(DOCDIR)
	install -m 0644 LICENSE out/deb$(DOCDIR)/copyright
	install -m 0644 README.md docs/*.md deploy/alerts.yaml deploy/grafana-dashboard.json deploy/selinux/* out/deb$(DOCDIR)/
	install -m 0755 deploy/debian/postinst deploy/debian/prerm deploy/debian/postrm out/deb/DEBIAN/
	install -m 0644 deploy/debian/conffiles out/deb/DEBIAN/
	(cd out/deb && find usr -type f -exec md5sum {} +) > out/deb/DEBIAN/md5sums
	sed "s/@VERSION@/$(DEBVERSION)/; s/@ARCH@/$$($(GO) env GOARCH)/; s/@SIZE@/$$(du -sk out/deb | cut -f1)/" \
		deploy/debian/control > out/deb/DEBIAN/control
	dpkg-deb --root-owner-group -z3 --build out/deb out/

.PHONY: clean
clean: ## bin/ and out/ (the cache stays)
	rm -rf bin out
