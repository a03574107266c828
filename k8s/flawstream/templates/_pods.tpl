{{/* Shared by all pods: security context, mounts and environment. */}}

{{/* The Pod Security Standard `restricted`. */}}
{{- define "flawstream.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.podSecurity.runAsUser }}
runAsGroup: {{ int64 .Values.podSecurity.runAsUser }}
fsGroup: {{ int64 .Values.podSecurity.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "flawstream.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
runAsNonRoot: true
{{- end -}}

{{/* Start of a pod's spec. Takes (dict "root" $ "place" values with nodeSelector, tolerations, affinity), and for pods
     that do the same work "spread" true and "component": they are placed on different nodes if possible. */}}
{{- define "flawstream.podStart" -}}
securityContext: {{- include "flawstream.podSecurity" .root | nindent 2 }}
enableServiceLinks: false  # a Service named flawstream-... would add FLAWSTREAM_ variables
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- if and .root.Values.priorityClassName (not .noPriority) }}
priorityClassName: {{ .root.Values.priorityClassName }}
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
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "flawstream.selector" . | nindent 8 }}
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

{{/* Mounts of every container that runs flawstream. Takes (dict "root" $ "writes" whether it writes the registry). */}}
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
{{- end -}}

{{- define "flawstream.volumes" -}}
- name: settings
  configMap: {name: {{ include "flawstream.fullname" . }}}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.ray.tmpSize }}}
- name: shared-mem
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.ray.sharedMemory }}}
{{- with include "flawstream.redisSecret" . }}
- name: redis-secret
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items: [{key: {{ include "flawstream.redisPasswordKey" $ }}, path: password}]
{{- end }}
{{- if eq .Values.redis.mode "external" }}
{{- with .Values.redis.external.tls }}
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
{{- if .Values.api.auth.enabled }}
- name: api-secret
  secret:
    secretName: {{ include "flawstream.apiSecret" . }}
    defaultMode: 0440
    items: [{key: {{ .Values.api.auth.tokensKey }}, path: tokens}]
{{- end }}
{{- if eq .Values.registry.type "volume" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-models" (include "flawstream.fullname" .)) .Values.registry.volume.existingClaim }}
{{- else if .Values.registry.s3.caSecret }}
- name: s3-ca
  secret: {secretName: {{ .Values.registry.s3.caSecret }}, defaultMode: 0440, items: [{key: ca.crt, path: ca.crt}]}
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
