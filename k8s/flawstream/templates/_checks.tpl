{{/* Checks that a schema cannot express: values that contradict each other. Rendering fails then. */}}
{{- define "flawstream.check" -}}
{{- include "flawstream.checkLabels" . -}}
{{- include "flawstream.checkResources" . -}}
{{- include "flawstream.checkTraining" . -}}
{{- include "flawstream.checkUpgrade" . -}}
{{- include "flawstream.checkReplicas" . -}}
{{- $redis := (include "flawstream.settings" . | fromYaml).redis -}}
{{- if and (eq .Values.redis.mode "external") .Values.redis.external.cluster (lt (int $redis.shards) 1) -}}
{{- fail "redis.external.cluster needs settings.redis.shards, as many as the cluster has primaries or more" -}}
{{- end -}}
{{- end -}}

{{/* The groups of pods that are on: path in the values -> values. */}}
{{- define "flawstream.groups" -}}
{{- $groups := dict -}}
{{- with .Values -}}
{{- if .serve.enabled }}{{ $groups = dict "ray.head" .ray.head "serve.cpuWorkers" .serve.cpuWorkers }}{{ end -}}
{{- if and .serve.enabled .serve.gpuWorkers.enabled }}{{ $_ := set $groups "serve.gpuWorkers" .serve.gpuWorkers }}{{ end -}}
{{- if .workers.enabled }}{{ $_ := set $groups "workers" .workers }}{{ end -}}
{{- if .training.enabled }}{{ $_ := set $groups "training" .training }}{{ end -}}
{{- if .toolbox.enabled }}{{ $_ := set $groups "toolbox" .toolbox }}{{ end -}}
{{- if and .serve.enabled .ray.autoscaling.enabled }}{{ $_ := set $groups "ray.autoscaling" .ray.autoscaling }}{{ end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end -}}

{{/* Labels by which objects find their pods must stay as the chart sets them. */}}
{{- define "flawstream.checkLabels" -}}
{{- $labels := dict "commonLabels" .Values.commonLabels "pod.labels" .Values.pod.labels "redis.bundled.pod.labels" .Values.redis.bundled.pod.labels -}}
{{- range $path, $group := include "flawstream.groups" . | fromYaml }}{{ $_ := set $labels (printf "%s.pod.labels" $path) (default dict $group.pod).labels }}{{ end -}}
{{- $own := keys (include "flawstream.labels" (dict "root" (dict "Values" dict "Release" .Release "Chart" .Chart) "component" "x") | fromYaml) -}}
{{- range $path, $set := $labels -}}
{{- range $name, $_ := $set -}}
{{- if or (has $name $own) (hasPrefix "ray.io/" $name) -}}
{{- fail (printf "%s: the label %s is set by the chart or by KubeRay, and selects pods; choose another name" $path $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "flawstream.checkResources" -}}
{{- $shared := include "flawstream.number" .Values.ray.sharedMemory | float64 -}}
{{- if lt $shared 100e6 -}}
{{- fail (printf "ray.sharedMemory=%v is too small: Ray's object store takes four fifths of it, and needs 75 MiB; set 100M or more" .Values.ray.sharedMemory) -}}
{{- end -}}
{{- range $path, $group := include "flawstream.groups" . | fromYaml -}}
{{- $limits := $group.resources.limits -}}
{{- range $name, $request := $group.resources.requests -}}
{{- with get $limits $name -}}
{{- if gt (include "flawstream.number" $request | float64) (include "flawstream.number" . | float64) -}}
{{- fail (printf "%s.resources: the limit of %s is %v, and less than the request, %v" $path $name . $request) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (ne $path "toolbox") (ne $path "ray.autoscaling") (ge $shared (include "flawstream.number" $limits.memory | float64)) -}}
{{- fail (printf "ray.sharedMemory=%v counts towards a pod's memory, and is not less than %s.resources.limits.memory=%v" $.Values.ray.sharedMemory $path $limits.memory) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* KubeRay gives a RayCronJob's jobs no labels, so Kueue would not see them. */}}
{{- define "flawstream.checkTraining" -}}
{{- with .Values.training -}}
{{- if and .enabled (or .queue .queuePriority) (eq .kind "RayCronJob") -}}
{{- fail "training.queue needs training.kind RayJob or CronJob: KubeRay does not hand labels on to the jobs of a RayCronJob" -}}
{{- end -}}
{{- if and .enabled .queuePriority (not .queue) -}}
{{- fail "training.queuePriority needs training.queue" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "flawstream.checkUpgrade" -}}
{{- if eq .Values.ray.upgradeStrategy "NewClusterWithIncrementalUpgrade" -}}
{{- $upgrade := .Values.ray.incrementalUpgrade -}}
{{- if not .Values.ray.autoscaling.enabled -}}
{{- fail "ray.upgradeStrategy=NewClusterWithIncrementalUpgrade grows and shrinks clusters: set ray.autoscaling.enabled=true" -}}
{{- end -}}
{{- if not $upgrade.gatewayClassName -}}
{{- fail "ray.upgradeStrategy=NewClusterWithIncrementalUpgrade needs a Gateway: set ray.incrementalUpgrade.gatewayClassName" -}}
{{- end -}}
{{- if gt (int $upgrade.stepSizePercent) (int $upgrade.maxSurgePercent) -}}
{{- fail (printf "ray.incrementalUpgrade.stepSizePercent=%d is more than maxSurgePercent=%d" (int $upgrade.stepSizePercent) (int $upgrade.maxSurgePercent)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "flawstream.checkReplicas" -}}
{{- $settings := include "flawstream.settings" . | fromYaml -}}
{{- $workers := default dict $settings.worker -}}
{{- if and (hasKey $workers "replicas") (eq (int $workers.replicas) 0) $workers.max_replicas -}}
{{- fail "settings.worker.max_replicas needs settings.worker.replicas of at least 1, and it is 0: leave one of them out" -}}
{{- end -}}
{{- if and .Values.workers.keda.enabled (gt (int .Values.workers.keda.minReplicas) (int .Values.workers.keda.maxReplicas)) -}}
{{- fail (printf "workers.keda.minReplicas=%d is more than maxReplicas=%d" (int .Values.workers.keda.minReplicas) (int .Values.workers.keda.maxReplicas)) -}}
{{- end -}}
{{- if .Values.serve.enabled -}}
{{- $gpus := float64 (default 0 (default dict $settings.detector).num_gpus) -}}
{{- if and (gt $gpus 0.0) (not .Values.serve.gpuWorkers.enabled) -}}
{{- fail "settings.detector.num_gpus requires a GPU, and no pod has one: set serve.gpuWorkers.enabled=true" -}}
{{- end -}}
{{- if and .Values.serve.gpuWorkers.enabled (le $gpus 0.0) -}}
{{- fail "serve.gpuWorkers.enabled starts pods with GPUs, and no detector requires one: set settings.detector.num_gpus" -}}
{{- end -}}
{{- $limit := get .Values.serve.cpuWorkers.resources.limits "cpu" -}}
{{- range $part := list "api" "worker" "detector" -}}
{{- $section := default dict (get $settings $part) -}}
{{- $cpus := ternary $section.num_cpus (ternary 0.1 0 (eq $part "api")) (hasKey $section "num_cpus") | float64 -}}
{{- if le (float64 (default 0 $section.num_gpus)) 0.0 -}}
{{- if le $cpus 0.0 -}}
{{- fail (printf "settings.%s.num_cpus=0 lets replicas run on the head, which restarts and gets no requests: set more, e.g. 0.1" $part) -}}
{{- end -}}
{{- if and $limit (gt $cpus (include "flawstream.number" $limit | float64)) -}}
{{- fail (printf "settings.%s.num_cpus=%v is more than a pod has, so no replica can start: raise serve.cpuWorkers.resources.limits.cpu=%v" $part $section.num_cpus $limit) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if .Values.ray.autoscaling.enabled -}}
{{- range $group := list "cpuWorkers" "gpuWorkers" -}}
{{- $bounds := get $.Values.serve $group -}}
{{- range $name := list "minReplicas" "replicas" -}}
{{- if gt (int (get $bounds $name)) (int $bounds.maxReplicas) -}}
{{- fail (printf "serve.%s.%s=%d is more than maxReplicas=%d" $group $name (int (get $bounds $name)) (int $bounds.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
