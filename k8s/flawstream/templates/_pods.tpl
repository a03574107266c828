{{/* Shared by all pods: security context, mounts and environment. */}}

{{/* What `pod` of the values adds to a pod: that for every pod and that of its kind. Takes "root" and "place". */}}
{{- define "flawstream.extras" -}}
{{- $all := .root.Values.pod -}}
{{- $own := default dict .place.pod -}}
{{- $extras := dict "runtimeClassName" (default $all.runtimeClassName $own.runtimeClassName) -}}
{{- range list "labels" "annotations" }}{{ $_ := set $extras . (merge (dict) (default dict (get $own .)) (default dict (get $all .))) }}{{ end -}}
{{- range list "volumes" "volumeMounts" "initContainers" "sidecars" }}{{ $_ := set $extras . (concat (default list (get $all .)) (default list (get $own .))) }}{{ end -}}
{{- toYaml $extras -}}
{{- end -}}

{{/* One of its lists. Takes (list context name). */}}
{{- define "flawstream.extra" -}}
{{- with get (include "flawstream.extras" (index . 0) | fromYaml) (index . 1) }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{/* The Pod Security Standard `restricted`. Without user and groups OpenShift sets those of the namespace. */}}
{{- define "flawstream.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.podSecurity.runAsUser }}
runAsUser: {{ int64 . }}
runAsGroup: {{ int64 . }}
{{- end }}
{{- with .Values.podSecurity.fsGroup }}
fsGroup: {{ int64 . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "flawstream.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
runAsNonRoot: true
{{- end -}}

{{/* Start of a pod's spec. Takes (dict "root" $ "place" values with nodeSelector, tolerations, affinity, pod), and for pods
     that do the same work "component" and "spread", the label that tells an old set of them from a new one: they are placed in
     different zones and on different nodes if possible. */}}
{{- define "flawstream.podStart" -}}
{{- $pod := . -}}
securityContext: {{- include "flawstream.podSecurity" .root | nindent 2 }}
enableServiceLinks: false  # a Service named flawstream-... would add FLAWSTREAM_ variables
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with ternary .root.Values.training.priorityClassName .root.Values.priorityClassName (hasPrefix "train" .component) }}
priorityClassName: {{ . }}
{{- end }}
{{- with (include "flawstream.extras" . | fromYaml).runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .place.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .spread }}
topologySpreadConstraints:
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "flawstream.selector" $pod | nindent 8 }}
    matchLabelKeys: [{{ $pod.spread }}]
  {{- end }}
{{- end }}
{{- with include "flawstream.extra" (list . "initContainers") }}
initContainers: {{- . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Environment of every container that runs flawstream. */}}
{{- define "flawstream.env" -}}
- {name: FLAWSTREAM_CONFIG, value: /etc/flawstream/settings.yaml}
- {name: HOME, value: /tmp}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO, value: "0"}
{{- if eq .Values.ray.auth "disabled" }}
- {name: RAY_AUTH_MODE, value: disabled}
{{- end }}
{{- if eq .Values.registry.type "s3" }}
{{- with .Values.registry.s3 }}
- {name: AWS_DEFAULT_REGION, value: {{ .region | quote }}}
{{- with .endpointUrl }}
- {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- if .existingSecret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom: {secretKeyRef: {name: {{ $.Values.registry.s3.existingSecret }}, key: {{ . }}}}
{{- end }}
{{- end }}
{{- if .caSecret }}
- {name: AWS_CA_BUNDLE, value: /run/secrets/flawstream/s3-ca/ca.crt}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Mounts of every container that runs flawstream. Takes (dict "root" $ "place" ... "writes" whether it writes the registry). */}}
{{- define "flawstream.mounts" -}}
- {name: settings, mountPath: /etc/flawstream, readOnly: true}
- {name: tmp, mountPath: /tmp}
- {name: shared-mem, mountPath: /dev/shm}
{{- if include "flawstream.redisSecret" .root }}
- {name: redis-secret, mountPath: /run/secrets/flawstream/redis, readOnly: true}
{{- end }}
{{- if eq .root.Values.redis.mode "external" }}
{{- if .root.Values.redis.external.tls.caSecret }}
- {name: redis-ca, mountPath: /run/secrets/flawstream/redis-ca, readOnly: true}
{{- end }}
{{- if .root.Values.redis.external.tls.clientSecret }}
- {name: redis-client, mountPath: /run/secrets/flawstream/redis-client, readOnly: true}
{{- end }}
{{- end }}
{{- if .root.Values.api.auth.enabled }}
- {name: api-secret, mountPath: /run/secrets/flawstream/api, readOnly: true}
{{- end }}
{{- if eq .root.Values.registry.type "volume" }}
- {name: models, mountPath: /models{{ if not .writes }}, readOnly: true{{ end }}}
{{- else if .root.Values.registry.s3.caSecret }}
- {name: s3-ca, mountPath: /run/secrets/flawstream/s3-ca, readOnly: true}
{{- end }}
{{- with include "flawstream.extra" (list . "volumeMounts") }}
{{ . }}
{{- end }}
{{- end -}}

{{/* Volumes of every pod that runs flawstream. Takes (dict "root" $ "place" ...). */}}
{{- define "flawstream.volumes" -}}
- name: settings
  configMap: {name: {{ include "flawstream.fullname" .root }}}
- name: tmp
  emptyDir: {sizeLimit: {{ .root.Values.ray.tmpSize }}}
- name: shared-mem
  emptyDir: {medium: Memory, sizeLimit: {{ .root.Values.ray.sharedMemory }}}
{{- with include "flawstream.redisSecret" .root }}
- name: redis-secret
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items: [{key: {{ include "flawstream.redisPasswordKey" $.root }}, path: password}]
{{- end }}
{{- if eq .root.Values.redis.mode "external" }}
{{- with .root.Values.redis.external.tls }}
{{- if .caSecret }}
- name: redis-ca
  secret: {secretName: {{ .caSecret }}, defaultMode: 0440, items: [{key: {{ .caKey }}, path: ca.crt}]}
{{- end }}
{{- if .clientSecret }}
- name: redis-client
  secret: {secretName: {{ .clientSecret }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- end }}
{{- if .root.Values.api.auth.enabled }}
- name: api-secret
  secret:
    secretName: {{ include "flawstream.apiSecret" .root }}
    defaultMode: 0440
    items: [{key: {{ .root.Values.api.auth.tokensKey }}, path: tokens}]
{{- end }}
{{- if eq .root.Values.registry.type "volume" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-models" (include "flawstream.fullname" .root)) .root.Values.registry.volume.existingClaim }}
{{- else if .root.Values.registry.s3.caSecret }}
- name: s3-ca
  secret: {secretName: {{ .root.Values.registry.s3.caSecret }}, defaultMode: 0440, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- with include "flawstream.extra" (list . "volumes") }}
{{ . }}
{{- end }}
{{- end -}}

{{/* Resources with GPUs among the limits. Takes (dict "resources" ... "gpus" n "gpuName" ...). */}}
{{- define "flawstream.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int .gpus) 0 -}}
{{- $limits := default dict $resources.limits -}}
{{- $_ := set $limits .gpuName (toString (int .gpus)) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
