// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {IAttributionLog} from "./interfaces/IAttributionLog.sol";
import {RFC6962} from "./RFC6962.sol";

/// @title Heads of receipt logs, one compare-and-set each
contract AttributionLog is IAttributionLog, EIP712 {
    struct Log {
        bytes32 root;
        uint64 size; // size and submitter share a slot: an anchor writes two slots and creates none after the first
        address submitter;
        address owner;
    }

    uint16 private constant LOG_INIT_SCHEMA = 0x0301;
    bytes32 private constant REGISTRATION_TYPE_HASH =
        keccak256("Registration(bytes32 logId,address owner,address submitter,address payee)");

    mapping(bytes32 logId => Log) private _logs;

    constructor() EIP712("OpenLoRA Log", "1") {}

    /// @inheritdoc IAttributionLog
    function registerLog(LogInit calldata init, address submitter, address payee, bytes calldata signature) external {
        bytes32 logId = logIdOf(init);
        Log storage log = _logs[logId];
        if (log.owner != address(0)) revert LogAlreadyRegistered(logId);
        if (payee == address(0)) revert ZeroPayee();
        bytes32 digest =
            _hashTypedDataV4(keccak256(abi.encode(REGISTRATION_TYPE_HASH, logId, msg.sender, submitter, payee)));
        // The third value only explains the fault.
        // slither-disable-next-line unused-return
        (address signer, ECDSA.RecoverError fault,) = ECDSA.tryRecoverCalldata(digest, signature);
        if (fault != ECDSA.RecoverError.NoError || signer != init.signer) revert InvalidRegistrationSignature();

        log.owner = msg.sender;
        log.submitter = submitter;
        emit LogRegistered(logId, msg.sender, submitter, payee);
    }

    /// @inheritdoc IAttributionLog
    function setSubmitter(bytes32 logId, address submitter) external {
        Log storage log = _logs[logId];
        if (msg.sender != log.owner) revert NotLogOwner(logId, msg.sender);
        log.submitter = submitter;
        emit SubmitterChanged(logId, submitter);
    }

    /// @inheritdoc IAttributionLog
    function anchor(bytes32 logId, uint64 previousSize, bytes32 previousRoot, uint64 size, bytes32 root) external {
        Log storage log = _logs[logId];
        if (msg.sender != log.submitter) revert NotSubmitter(logId, msg.sender);
        if (log.size != previousSize || log.root != previousRoot) revert HeadMoved(logId, log.size, log.root);
        if (size <= previousSize) revert SizeNotGrowing(previousSize, size);
        if (root == bytes32(0)) revert ZeroRoot();

        log.size = size;
        log.root = root;
        emit Anchored(logId, size, root, previousSize);
    }

    /// @inheritdoc IAttributionLog
    function headOf(bytes32 logId) external view returns (uint64 size, bytes32 root, address submitter) {
        Log storage log = _logs[logId];
        return (log.size, log.root, log.submitter);
    }

    /// @inheritdoc IAttributionLog
    function ownerOf(bytes32 logId) external view returns (address owner) {
        return _logs[logId].owner;
    }

    /// @inheritdoc IAttributionLog
    function verifyInclusion(bytes32 root, uint64 size, uint64 index, bytes calldata leaf, bytes32[] calldata proof)
        external
        pure
        returns (bool valid)
    {
        return RFC6962.includes(root, size, index, RFC6962.leafHash(leaf), proof);
    }

    /// @inheritdoc IAttributionLog
    function verifyConsistency(uint64 size1, bytes32 root1, uint64 size2, bytes32 root2, bytes32[] calldata proof)
        external
        pure
        returns (bool valid)
    {
        return RFC6962.extends(size1, root1, size2, root2, proof);
    }

    /// @inheritdoc IAttributionLog
    function logIdOf(LogInit calldata init) public pure returns (bytes32 logId) {
        return sha256(abi.encode(LOG_INIT_SCHEMA, bytes32(0), init));
    }
}
