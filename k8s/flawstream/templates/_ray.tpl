{{/* Ray pods, of the RayService and of training. */}}

{{/* Arguments of `ray start` for every group. Ray sizes its object store by the pod's memory, and puts one that is larger than
     /dev/shm into a folder on disk. A fifth of /dev/shm is left for others. KubeRay counts GPUs whose resource is named ...gpu only,
     and Ray all that it sees, of other pods too. Takes (dict "root" $ "gpus" n). */}}
{{- define "flawstream.rayStartParams" -}}
metrics-export-port: "8080"
num-gpus: {{ int .gpus | quote }}
object-store-memory: {{ include "flawstream.number" .root.Values.ray.sharedMemory | float64 | mulf 0.8 | floor | int64 | quote }}
{{- end -}}

{{/* Seconds for which a node of the service drains when its pod is stopped: its stream workers finish (worker.drain_s), and Serve starts
     replicas elsewhere. Ray's default is 30. */}}
{{- define "flawstream.drainSeconds" -}}
{{- $worker := default dict (include "flawstream.settings" . | fromYaml).worker -}}
{{- max 30 (add (ceil (float64 (default 20 $worker.drain_s))) 10) -}}
{{- end -}}

{{/* A pod template. Takes (dict "root" $ "component" ... "head" bool "serving" bool "place" ... "resources" ... "gpus" n
     "gpuName" ... "data" bool). */}}
{{- define "flawstream.rayPod" -}}
{{- $head := not (not .head) -}}
{{- $state := .root.Values.ray.gcsFaultTolerance -}}
{{- $stateCa := and $head .serving $state.enabled (eq $state.mode "external") $state.caSecret -}}
{{- $scaled := not (not (and .head .serving .root.Values.ray.autoscaling.enabled)) -}}
metadata:
  labels: {{- include "flawstream.podLabels" . | nindent 4 }}
  {{- with include "flawstream.podAnnotations" . }}
  annotations: {{- . | nindent 4 }}
  {{- end }}
spec:
  {{- include "flawstream.podStart" . | nindent 2 }}
  serviceAccountName: {{ ternary (printf "%s-head" (include "flawstream.fullname" .root)) (include "flawstream.serviceAccount" .root) $scaled }}
  automountServiceAccountToken: {{ $scaled }}{{ if $scaled }}  # Ray's autoscaler requests pods from the API server{{ end }}
  {{- $drain := ternary (int (include "flawstream.drainSeconds" .root)) 30 (not (not .serving)) }}
  terminationGracePeriodSeconds: {{ add $drain 30 }}  # draining, and the end of Ray's processes
  containers:
    - name: {{ ternary "ray-head" "ray-worker" $head }}
      image: {{ ternary (include "flawstream.cudaImage" .root) (include "flawstream.image" .root) (gt (int .gpus) 0) }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      securityContext: {{- include "flawstream.containerSecurity" .root | nindent 8 }}
      env:
        {{- include "flawstream.env" .root | nindent 8 }}
        - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ $drain | quote }}}
        {{- if $stateCa }}
        - {name: RAY_REDIS_CA_CERT, value: /run/secrets/flawstream/ray-state-ca/ca.crt}
        {{- end }}
        {{- if .head }}
        {{- with .root.Values.monitoring }}
        {{- if .prometheusUrl }}
        - {name: RAY_PROMETHEUS_HOST, value: {{ .prometheusUrl | quote }}}
        - {name: RAY_PROMETHEUS_NAME, value: {{ .prometheusName | quote }}}
        {{- end }}
        {{- if .grafanaUrl }}
        - {name: RAY_GRAFANA_HOST, value: {{ .grafanaUrl | quote }}}
        {{- end }}
        {{- if or .grafanaBrowserUrl .grafanaUrl }}
        - {name: RAY_GRAFANA_IFRAME_HOST, value: {{ default .grafanaUrl .grafanaBrowserUrl | quote }}}
        {{- end }}
        {{- end }}
        {{- end }}
      ports:
        {{- if .head }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: dash-metrics, containerPort: 44227}
        {{- if $scaled }}
        - {name: as-metrics, containerPort: 44217}
        {{- end }}
        {{- end }}
        - {name: agent, containerPort: 52365}
        - {name: metrics, containerPort: 8080}
        {{- if .serving }}
        - {name: serve, containerPort: 8000}
        {{- end }}
      # Ray takes half a minute to start, and twice that if the image was just pulled to a slow disk.
      startupProbe: {httpGet: {path: /api/healthz, port: agent}, periodSeconds: 5, failureThreshold: 60, timeoutSeconds: 5}
      livenessProbe: {httpGet: {path: /api/healthz, port: agent}, periodSeconds: 10, failureThreshold: 12, timeoutSeconds: 5}
      {{- if and .serving (not .head) }}
      # Serve's proxy, which runs only in pods with a replica: other pods get no requests.
      readinessProbe: {httpGet: {path: /-/healthz, port: serve}, periodSeconds: 5, failureThreshold: 3, timeoutSeconds: 5}
      {{- else }}
      readinessProbe: {httpGet: {path: /api/healthz, port: agent}, periodSeconds: 5, failureThreshold: 10, timeoutSeconds: 5}
      {{- end }}
      resources: {{- include "flawstream.resources" . | nindent 8 }}
      volumeMounts:
        {{- include "flawstream.mounts" (dict "root" .root "place" .place "writes" .data) | nindent 8 }}
        {{- if .data }}
        {{- include "flawstream.dataMount" .root | nindent 8 }}
        {{- end }}
        {{- if $stateCa }}
        - {name: ray-state-ca, mountPath: /run/secrets/flawstream/ray-state-ca, readOnly: true}
        {{- end }}
    {{- with include "flawstream.extra" (list . "sidecars") }}
    {{- . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "flawstream.volumes" . | nindent 4 }}
    {{- if .data }}
    {{- include "flawstream.dataVolume" .root | nindent 4 }}
    {{- end }}
    {{- if $stateCa }}
    - name: ray-state-ca
      secret: {secretName: {{ $state.caSecret }}, defaultMode: 0440, items: [{key: ca.crt, path: ca.crt}]}
    {{- end }}
{{- end -}}

{{- define "flawstream.dataMount" -}}
- {name: data, mountPath: /data, readOnly: true{{ with .Values.training.data.subPath }}, subPath: {{ . | quote }}{{ end }}}
{{- end -}}

{{- define "flawstream.dataVolume" -}}
- name: data
  persistentVolumeClaim: {claimName: {{ .Values.training.data.existingClaim }}, readOnly: true}
{{- end -}}
