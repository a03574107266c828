{{/* flawstream's settings, used in the ConfigMap and in Serve's `args`. */}}

{{- define "flawstream.redisSecret" -}}
{{- if eq .Values.redis.mode "external" -}}
{{- .Values.redis.external.existingSecret -}}
{{- else -}}
{{- default (printf "%s-redis" (include "flawstream.fullname" .)) .Values.redis.bundled.auth.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "flawstream.redisPasswordKey" -}}
{{- ternary .Values.redis.external.passwordKey .Values.redis.bundled.auth.passwordKey (eq .Values.redis.mode "external") -}}
{{- end -}}

{{- define "flawstream.apiSecret" -}}
{{- default (printf "%s-api" (include "flawstream.fullname" .)) .Values.api.auth.existingSecret -}}
{{- end -}}

{{- define "flawstream.settings" -}}
{{- $redis := dict -}}
{{- if eq .Values.redis.mode "external" -}}
{{- $external := .Values.redis.external -}}
{{- $redis = dict "url" $external.url -}}
{{- with $external.username }}{{ $_ := set $redis "username" . }}{{ end -}}
{{- with $external.tls.caSecret }}{{ $_ := set $redis "tls_ca_file" "/run/secrets/flawstream/redis-ca/ca.crt" }}{{ end -}}
{{- if $external.tls.clientSecret -}}
{{- $_ := set $redis "tls_cert_file" "/run/secrets/flawstream/redis-client/tls.crt" -}}
{{- $_ := set $redis "tls_key_file" "/run/secrets/flawstream/redis-client/tls.key" -}}
{{- end -}}
{{- if $external.sentinels -}}
{{- $_ := set $redis "sentinels" $external.sentinels -}}
{{- $_ := set $redis "sentinel_primary" $external.sentinelPrimary -}}
{{- end -}}
{{- if $external.cluster }}{{ $_ := set $redis "cluster" true }}{{ end -}}
{{- else -}}
{{- $redis = dict "url" (printf "redis://%s-redis:6379/0" (include "flawstream.fullname" .)) -}}
{{- end -}}
{{- if include "flawstream.redisSecret" . }}{{ $_ := set $redis "password_file" "/run/secrets/flawstream/redis/password" }}{{ end -}}
{{- $api := dict "host" "0.0.0.0" "port" 8000 -}}
{{- if .Values.api.auth.enabled }}{{ $_ := set $api "tokens_file" "/run/secrets/flawstream/api/tokens" }}{{ end -}}
{{- $registry := dict "root" (ternary .Values.registry.s3.url "/models" (eq .Values.registry.type "s3")) -}}
{{/* No metrics port: it is in the workers' arguments, so that other commands in the same pod do not open it too. */}}
{{- $metrics := dict "host" "0.0.0.0" -}}
{{- $made := dict "redis" $redis "api" $api "registry" $registry "metrics" $metrics -}}
{{- mergeOverwrite (deepCopy .Values.settings) $made | toYaml -}}
{{- end -}}

{{/* Checks that a schema cannot express: values that contradict each other. Rendering fails then. */}}
{{- define "flawstream.check" -}}
{{- $settings := include "flawstream.settings" . | fromYaml -}}
{{- $detector := default dict $settings.detector -}}
{{- if and .Values.serve.enabled (gt (float64 (default 0 $detector.num_gpus)) 0.0) (not .Values.serve.gpuWorkers.enabled) -}}
{{- fail "settings.detector.num_gpus requires a GPU, and no pod has one: set serve.gpuWorkers.enabled=true" -}}
{{- end -}}
{{- if and .Values.serve.enabled .Values.serve.gpuWorkers.enabled (le (float64 (default 0 $detector.num_gpus)) 0.0) -}}
{{- fail "serve.gpuWorkers.enabled starts pods with GPUs, and no detector requires one: set settings.detector.num_gpus" -}}
{{- end -}}
{{- $shared := include "flawstream.number" .Values.ray.sharedMemory | float64 -}}
{{- if lt $shared 100e6 -}}
{{- fail (printf "ray.sharedMemory=%v is too small: Ray's object store takes four fifths of it, and needs 75 MiB; set 100M or more" .Values.ray.sharedMemory) -}}
{{- end -}}
{{- $groups := dict -}}
{{- if .Values.serve.enabled }}{{ $groups = dict "ray.head" .Values.ray.head "serve.cpuWorkers" .Values.serve.cpuWorkers }}{{ end -}}
{{- if and .Values.serve.enabled .Values.serve.gpuWorkers.enabled }}{{ $_ := set $groups "serve.gpuWorkers" .Values.serve.gpuWorkers }}{{ end -}}
{{- if .Values.training.enabled }}{{ $_ := set $groups "training" .Values.training }}{{ end -}}
{{- range $path, $group := $groups -}}
{{- if ge $shared (include "flawstream.number" $group.resources.limits.memory | float64) -}}
{{- fail (printf "ray.sharedMemory=%v counts towards a pod's memory, and is not less than %s.resources.limits.memory=%v" $.Values.ray.sharedMemory $path $group.resources.limits.memory) -}}
{{- end -}}
{{- end -}}
{{- $shards := int (default 0 (default dict $settings.redis).shards) -}}
{{- if and (eq .Values.redis.mode "external") .Values.redis.external.cluster (lt $shards 1) -}}
{{- fail "redis.external.cluster needs settings.redis.shards, as many as the cluster has primaries or more" -}}
{{- end -}}
{{- range $part := list "api" "worker" "detector" -}}
{{- $section := default dict (get $settings $part) -}}
{{- $cpus := ternary $section.num_cpus (ternary 0.1 0 (eq $part "api")) (hasKey $section "num_cpus") -}}
{{- if and $.Values.serve.enabled (le (addf $cpus (default 0 $section.num_gpus)) 0.0) -}}
{{- fail (printf "settings.%s.num_cpus=0 lets replicas run on the head, which restarts and gets no requests: set more, e.g. 0.1" $part) -}}
{{- end -}}
{{- end -}}
{{- $cpus := .Values.serve.cpuWorkers.resources.limits -}}
{{- if and .Values.serve.enabled $cpus -}}
{{- $limit := float64 (trimSuffix "m" (toString (default 0 $cpus.cpu))) -}}
{{- if hasSuffix "m" (toString (default 0 $cpus.cpu)) }}{{ $limit = divf $limit 1000.0 }}{{ end -}}
{{- range $part := list "worker" "detector" -}}
{{- $section := default dict (get $settings $part) -}}
{{- $gpus := float64 (default 0 $section.num_gpus) -}}
{{- if and (gt $limit 0.0) (le $gpus 0.0) (gt (float64 (default 0 $section.num_cpus)) $limit) -}}
{{- fail (printf "settings.%s.num_cpus=%v is more than a pod has, so no replica can start: raise serve.cpuWorkers.resources.limits.cpu=%v" $part $section.num_cpus $cpus.cpu) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $workers := default dict $settings.worker -}}
{{- if and (hasKey $workers "replicas") (eq (int $workers.replicas) 0) $workers.max_replicas -}}
{{- fail "settings.worker.max_replicas needs settings.worker.replicas of at least 1, and it is 0: leave one of them out" -}}
{{- end -}}
{{- range $group := list "cpuWorkers" "gpuWorkers" -}}
{{- $bounds := get $.Values.serve $group -}}
{{- if and $.Values.ray.autoscaling.enabled (gt (int $bounds.minReplicas) (int $bounds.maxReplicas)) -}}
{{- fail (printf "serve.%s.minReplicas=%d is more than maxReplicas=%d" $group (int $bounds.minReplicas) (int $bounds.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.workers.keda.enabled (gt (int .Values.workers.keda.minReplicas) (int .Values.workers.keda.maxReplicas)) -}}
{{- fail (printf "workers.keda.minReplicas=%d is more than maxReplicas=%d" (int .Values.workers.keda.minReplicas) (int .Values.workers.keda.maxReplicas)) -}}
{{- end -}}
{{- end -}}
