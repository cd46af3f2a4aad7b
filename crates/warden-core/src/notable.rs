//! PostgreSQL's own functions that are worth a record when a statement calls them: those that reach
//! files, large objects, settings, other sessions, replication or the server itself, or that run a
//! query which their argument holds.
//!
//! Owns the list, by OID: the OIDs of built-in functions do not change between servers. (Two are used again since 17,
//! those of pg_rotate_logfile_old and pg_read_file_old, and are not in it.) What all
//! functions do that compute something, and read no more than the statement says, is not in it.

/// OID and name, by OID.
#[rustfmt::skip]
const FUNCTIONS: &[(u32, &str)] = &[
    (715, "lo_create"),
    (764, "lo_import"),
    (765, "lo_export"),
    (767, "lo_import"),
    (952, "lo_open"),
    (953, "lo_close"),
    (954, "loread"),
    (955, "lowrite"),
    (956, "lo_lseek"),
    (957, "lo_creat"),
    (958, "lo_tell"),
    (964, "lo_unlink"),
    (1004, "lo_truncate"),
    (1576, "setval"),
    (1765, "setval"),
    (2078, "set_config"),
    (2096, "pg_terminate_backend"),
    (2171, "pg_cancel_backend"),
    (2172, "pg_backup_start"),
    (2274, "pg_stat_reset"),
    (2307, "pg_stat_reset_slru"),
    (2621, "pg_reload_conf"),
    (2622, "pg_rotate_logfile"),
    (2623, "pg_stat_file"),
    (2624, "pg_read_file"),
    (2625, "pg_ls_dir"),
    (2739, "pg_backup_stop"),
    (2848, "pg_switch_wal"),
    (2924, "query_to_xml"),
    (2925, "cursor_to_xml"),
    (2927, "query_to_xmlschema"),
    (2928, "cursor_to_xmlschema"),
    (2930, "query_to_xml_and_xmlschema"),
    (3036, "pg_notify"),
    (3071, "pg_wal_replay_pause"),
    (3072, "pg_wal_replay_resume"),
    (3098, "pg_create_restore_point"),
    (3170, "lo_lseek64"),
    (3171, "lo_tell64"),
    (3172, "lo_truncate64"),
    (3293, "pg_read_file"),
    (3295, "pg_read_binary_file"),
    (3297, "pg_ls_dir"),
    (3307, "pg_stat_file"),
    (3329, "pg_show_all_file_settings"),
    (3353, "pg_ls_logdir"),
    (3354, "pg_ls_waldir"),
    (3401, "pg_hba_file_rules"),
    (3436, "pg_promote"),
    (3445, "pg_import_system_collations"),
    (3457, "lo_from_bytea"),
    (3458, "lo_get"),
    (3459, "lo_get"),
    (3460, "lo_put"),
    (3577, "pg_logical_emit_message"),
    (3578, "pg_logical_emit_message"),
    (3775, "pg_stat_reset_shared"),
    (3776, "pg_stat_reset_single_table_counters"),
    (3777, "pg_stat_reset_single_function_counters"),
    (3779, "pg_create_physical_replication_slot"),
    (3780, "pg_drop_replication_slot"),
    (3782, "pg_logical_slot_get_changes"),
    (3783, "pg_logical_slot_get_binary_changes"),
    (3784, "pg_logical_slot_peek_changes"),
    (3785, "pg_logical_slot_peek_binary_changes"),
    (3786, "pg_create_logical_replication_slot"),
    (3809, "pg_export_snapshot"),
    (3826, "pg_read_file"),
    (3827, "pg_read_binary_file"),
    (3828, "pg_read_binary_file"),
    (3878, "pg_replication_slot_advance"),
    (4220, "pg_copy_physical_replication_slot"),
    (4221, "pg_copy_physical_replication_slot"),
    (4222, "pg_copy_logical_replication_slot"),
    (4223, "pg_copy_logical_replication_slot"),
    (4224, "pg_copy_logical_replication_slot"),
    (4543, "pg_log_backend_memory_contexts"),
    (5029, "pg_ls_tmpdir"),
    (5030, "pg_ls_tmpdir"),
    (5031, "pg_ls_archive_statusdir"),
    (6003, "pg_replication_origin_create"),
    (6004, "pg_replication_origin_drop"),
    (6006, "pg_replication_origin_session_setup"),
    (6007, "pg_replication_origin_session_reset"),
    (6008, "pg_replication_origin_session_is_setup"),
    (6009, "pg_replication_origin_session_progress"),
    (6010, "pg_replication_origin_xact_setup"),
    (6011, "pg_replication_origin_xact_reset"),
    (6012, "pg_replication_origin_advance"),
    (6013, "pg_replication_origin_progress"),
    (6170, "pg_stat_reset_replication_slot"),
    (6208, "pg_read_file"),
    (6209, "pg_read_binary_file"),
    (6232, "pg_stat_reset_subscription_stats"),
    (6250, "pg_ident_file_mappings"),
    (6270, "pg_ls_logicalsnapdir"),
    (6271, "pg_ls_logicalmapdir"),
    (6272, "pg_ls_replslotdir"),
    (6305, "pg_log_standby_snapshot"),
    (6344, "pg_sync_replication_slots"),
    (6362, "pg_restore_relation_stats"),
    (6363, "pg_restore_attribute_stats"),
    (6387, "pg_stat_reset_backend_stats"),
    (6397, "pg_clear_relation_stats"),
    (6398, "pg_clear_attribute_stats"),
    (6400, "pg_ls_summariesdir"),
];

/// The name of a function of `pg_catalog` that is worth a record.
#[must_use]
pub fn name_of(oid: u32) -> Option<&'static str> {
    let at = FUNCTIONS.binary_search_by_key(&oid, |f| f.0).ok()?;
    Some(FUNCTIONS[at].1)
}

/// The list.
#[must_use]
pub fn functions() -> &'static [(u32, &'static str)] {
    FUNCTIONS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_in_order() {
        assert!(FUNCTIONS.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(name_of(765), Some("lo_export"));
        assert_eq!(name_of(65), None, "int4eq");
    }
}
